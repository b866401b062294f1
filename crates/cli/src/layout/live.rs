//! The layout of a live engine, asked of it.

use std::path::Path;
use std::time::Duration;

use kvxfer::engine::{PeerLayout, describe};

use super::args::Ask;
use super::source::Layout;
use crate::args::Tuning;
use crate::problem::{Exit, Problem};
use crate::run::Settings;
use crate::say;
use crate::size::{Address, BadValue};

/// Limit of connecting and of the answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The model of a cache that is described without one.
const OPAQUE: &str = "opaque";

/// Whether `text` is `HOST:PORT`, and not a file.
pub(super) fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let host = host
        .strip_prefix('[')
        .map_or(host, |v6| v6.trim_end_matches(']'));
    digits && !host.is_empty() && !host.contains(['/', '=']) && !Path::new(text).exists()
}

/// Asks the engine that listens at `address`.
pub(super) fn layout(address: &str, ask: &Ask) -> Result<Layout, Problem> {
    let bad = |error: BadValue| Problem::usage(error.to_string());
    address.parse::<Address>().map_err(bad)?;
    let settings = Settings::gather(&Tuning::default(), &ask.trust, &[], None, true)
        .map_err(|error| Problem::of(&error))?;
    let failed = |error: kvxfer::Error| {
        let problem = crate::explain::library(&error);
        match problem.exit {
            Exit::Peer if !problem.to_string().contains(address) => {
                problem.with_evidence(format!("the engine is {address}"))
            }
            _ => problem,
        }
    };
    settings.check_secret().map_err(failed)?;
    let timeout = ask.timeout.unwrap_or(TIMEOUT);
    let PeerLayout {
        format, placement, ..
    } = describe(&settings.config, address, timeout).map_err(failed)?;
    let layout = Layout {
        format,
        topology: *placement.topology(),
    };
    if layout.format.model().model_type == OPAQUE {
        say::aside(format_args!(
            "kvxfer: warning: {address} keeps blocks of no model, as `kvxfer serve` does without --model"
        ));
    }
    // What is shown and compared is what a rank of its place keeps. An engine that keeps other parts
    // would be misjudged by that.
    let usual = layout.placed().map_err(|error| {
        Problem::from_chain(Exit::Check, &error).with_evidence(format!("the engine is {address}"))
    })?;
    let parts = |desc: &kvxfer::layout::PlacementDesc| {
        let mut parts: Vec<_> = desc.tensors().iter().collect();
        parts.sort_unstable_by_key(|t| (t.group, t.layer, t.tensor));
        let part = |t: &kvxfer::layout::PlacedTensor| {
            let of = (t.group, t.layer, t.tensor);
            let shard = |format| t.shard_of(format);
            (of, layout.format.tensor(of.0, of.1, of.2).and_then(shard))
        };
        parts.into_iter().map(part).collect::<Vec<_>>()
    };
    if parts(&usual) != parts(&placement) {
        let rank = layout.topology.rank;
        let cause = format!("{address} keeps other parts of its model than rank {rank} would");
        return Err(Problem::new(Exit::Check, cause).with_fix(
            "look at the shards that its engine describes; an even share of heads and layers is what is known here",
        ));
    }
    Ok(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_ends_in_a_port_and_is_no_file() {
        for text in [
            "node7:7301",
            "10.0.0.7:1",
            "[::1]:7301",
            "a.b:0",
            "[fe80::1%eth0]:7",
        ] {
            assert!(is_address(text), "{text}");
        }
        for text in [
            "llama-3.1-8b",
            "config.json:tp=4",
            "config.json:mtp",
            ":7301",
            "host:",
            "dir/x:7301",
            "x:tp=4,block-size=16",
            "[]:7301",
        ] {
            assert!(!is_address(text), "{text}");
        }
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("odd:7301");
        std::fs::write(&file, "{}").expect("written");
        assert!(!is_address(file.to_str().expect("text")));
    }
}
