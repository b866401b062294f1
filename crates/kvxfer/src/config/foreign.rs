//! Keys of other systems' kv-transfer-configs, and what a misspelt key may have meant.

use super::KEYS;

/// A key of another system.
pub(super) struct Foreign {
    pub(super) name: &'static str,
    /// Why it has no effect here.
    pub(super) note: &'static str,
}

const PROXY: &str = "ignored: it is for the proxy, which kvxfer does not talk to";
const ENGINE: &str = "ignored: it is for the engine";
const ONE_PORT: &str = "ignored: kvxfer has one port; set port";
const CONNECTOR: &str = "ignored: it is for another connector";

/// The keys that are known and ignored. `kv_connector_extra_config` is not among them: it is read.
pub(super) const FOREIGN: &[Foreign] = &[
    Foreign {
        name: "kv_connector",
        note: ENGINE,
    },
    Foreign {
        name: "kv_connector_module_path",
        note: ENGINE,
    },
    Foreign {
        name: "kv_load_failure_policy",
        note: "ignored: it is for the engine; every error's class says retry, recompute or fatal",
    },
    Foreign {
        name: "kv_buffer_device",
        note: "ignored: memory is used where it lies",
    },
    Foreign {
        name: "kv_buffer_size",
        note: CONNECTOR,
    },
    Foreign {
        name: "kv_rank",
        note: "ignored: the engine gives its rank with its placement",
    },
    Foreign {
        name: "kv_parallel_size",
        note: CONNECTOR,
    },
    Foreign {
        name: "kv_ip",
        note: "ignored: set listen or host_ip",
    },
    Foreign {
        name: "kv_port",
        note: ONE_PORT,
    },
    Foreign {
        name: "enable_permute_local_kv",
        note: "ignored: layouts are compared field by field",
    },
    Foreign {
        name: "proxy_ip",
        note: PROXY,
    },
    Foreign {
        name: "proxy_port",
        note: PROXY,
    },
    Foreign {
        name: "proxy_ping_port",
        note: PROXY,
    },
    Foreign {
        name: "http_port",
        note: PROXY,
    },
    Foreign {
        name: "local_ping_port",
        note: PROXY,
    },
    Foreign {
        name: "handshake_port",
        note: ONE_PORT,
    },
    Foreign {
        name: "notify_port",
        note: ONE_PORT,
    },
    Foreign {
        name: "side_channel_host",
        note: "ignored: set listen or host_ip",
    },
    Foreign {
        name: "side_channel_port",
        note: ONE_PORT,
    },
    Foreign {
        name: "backend",
        note: CONNECTOR,
    },
    Foreign {
        name: "backends",
        note: CONNECTOR,
    },
    Foreign {
        name: "connectors",
        note: CONNECTOR,
    },
    Foreign {
        name: "block_size",
        note: "ignored: the engine gives its format",
    },
    Foreign {
        name: "cpu_bytes_to_use",
        note: CONNECTOR,
    },
    Foreign {
        name: "read_mode",
        note: "ignored: pull and push are chosen for each request",
    },
    Foreign {
        name: "mooncake_protocol",
        note: CONNECTOR,
    },
];

/// What a key turned out to be.
#[derive(Clone, Copy)]
pub(super) enum Meaning {
    /// Index in [`KEYS`].
    Ours(usize),
    Foreign(&'static Foreign),
}

impl Meaning {
    pub(super) fn name(self) -> &'static str {
        match self {
            Meaning::Ours(index) => KEYS[index].name,
            Meaning::Foreign(foreign) => foreign.name,
        }
    }
}

fn all() -> impl Iterator<Item = Meaning> {
    (0..KEYS.len())
        .map(Meaning::Ours)
        .chain(FOREIGN.iter().map(Meaning::Foreign))
}

/// How a key was recognised.
pub(super) enum Recognised {
    Exactly(Meaning),
    /// One key alone is close enough.
    Misspelt(Meaning),
    /// None, or several that are equally close.
    Not(Vec<&'static str>),
}

/// Longest key that is compared with others.
const MAX_KEY: usize = 64;

/// Finds out what a key means.
pub(super) fn recognise(key: &str) -> Recognised {
    if let Some(meaning) = all().find(|m| m.name() == key) {
        return Recognised::Exactly(meaning);
    }
    if key.len() > MAX_KEY {
        return Recognised::Not(Vec::new());
    }
    let plain = key.to_ascii_lowercase().replace('-', "_");
    let mut nearest = usize::MAX;
    let mut found: Vec<Meaning> = Vec::new();
    for meaning in all() {
        let away = distance(&plain, meaning.name());
        if away < nearest {
            nearest = away;
            found.clear();
        }
        if away == nearest {
            found.push(meaning);
        }
    }
    // One slip in a short word, two in a longer one: more would be guessing.
    let bound = match key.len() {
        0..4 => 0,
        4..8 => 1,
        _ => 2,
    };
    match found.as_slice() {
        [one] if nearest <= bound => Recognised::Misspelt(*one),
        _ if nearest <= bound + 1 => {
            Recognised::Not(found.into_iter().map(Meaning::name).collect())
        }
        _ => Recognised::Not(Vec::new()),
    }
}

/// Insertions, deletions, replacements and swaps of neighbours that make `b` of `a` (optimal
/// string alignment).
pub(super) fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (last[j] + 1).min(row[j - 1] + 1).min(last[j - 1] + same);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("http_prt", "http_port"), 1);
        assert_eq!(distance("prot", "port"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kv_role", "kv_role"), 0);
    }

    #[test]
    fn no_name_stands_twice_and_none_passes_for_another() {
        let names: Vec<_> = all().map(Meaning::name).collect();
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name} stands twice");
            assert!(matches!(recognise(name), Recognised::Exactly(m) if m.name() == *name));
        }
    }
}
