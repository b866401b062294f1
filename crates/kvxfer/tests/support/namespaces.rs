//! Two network namespaces and a link between them, which can lose, delay and be cut.
//!
//! Needs root, `ip` (iproute2) and `nft` (nftables); without them a test says so and tests nothing.
#![allow(dead_code, reason = "each test file uses its part")]

use std::process::Command;

/// Set in the process that runs inside the first namespace: the names that were made.
const INSIDE: &str = "KVXFER_TEST_NETWORK";
/// From the range for benchmarks (RFC 2544), which nothing routes.
pub(crate) const HERE: &str = "198.18.7.1";
pub(crate) const THERE: &str = "198.18.7.2";

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", args.join(" "), said.trim()))
}

/// Two namespaces and the link between them; gone when dropped.
#[derive(Debug)]
struct Network {
    here: String,
    there: String,
}

impl Network {
    fn new(name: &str) -> Result<Self, String> {
        let id = std::process::id();
        let network = Self {
            here: format!("kvx-{id}-{name}-a"),
            there: format!("kvx-{id}-{name}-b"),
        };
        let (here, there) = (network.here.as_str(), network.there.as_str());
        run("nft", &["--version"])?;
        run("ip", &["netns", "add", here])?;
        run("ip", &["netns", "add", there])?;
        let link = "link add kvx0 type veth peer name kvx0 netns";
        let mut args = vec!["-n", here];
        args.extend(link.split(' '));
        args.push(there);
        run("ip", &args)?;
        for (namespace, address) in [(here, HERE), (there, THERE)] {
            let address = format!("{address}/30");
            run(
                "ip",
                &["-n", namespace, "addr", "add", &address, "dev", "kvx0"],
            )?;
            run("ip", &["-n", namespace, "link", "set", "kvx0", "up"])?;
            run("ip", &["-n", namespace, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.here, &self.there] {
            // It may never have been made.
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}

/// Runs the test of this name once more, inside the first of two namespaces.
fn within_a_network(test: &str) {
    let network = match Network::new(test) {
        Ok(network) => network,
        Err(why) => {
            // Some machines allow no namespaces; one that should is told by its tests step.
            assert!(
                std::env::var_os("KVXFER_NEED_NETWORK").is_none(),
                "no network to test with: {why}"
            );
            eprintln!("SKIPPED {test}: {why}");
            return;
        }
    };
    let status = Command::new("ip")
        .args(["netns", "exec", &network.here])
        .arg(std::env::current_exe().expect("this binary"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, &network.there)
        .status()
        .expect("ip was there just now");
    assert!(status.success(), "{test}: {status}");
}

/// The far namespace, seen from inside the near one.
#[derive(Debug)]
pub(crate) struct Far(String);

impl Far {
    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    pub(crate) fn nft(&self, rest: &[&str]) {
        let mut args = vec!["netns", "exec", self.0.as_str(), "nft"];
        args.extend(rest);
        run("ip", &args).expect("nft");
    }

    /// Drops so many of a hundred packets that come in there.
    pub(crate) fn lose(&self, percent: u32) {
        let chain = "{ type filter hook input priority 0 ; policy accept ; }";
        self.nft(&["add", "table", "inet", "kvx"]);
        self.nft(&["add", "chain", "inet", "kvx", "in", chain]);
        let percent = percent.to_string();
        let some = ["numgen", "random", "mod", "100", "<", &percent];
        // A number that is never reached is refused.
        let which = if percent == "100" { &[][..] } else { &some };
        self.nft(&[&["add", "rule", "inet", "kvx", "in"], which, &["drop"]].concat());
    }

    pub(crate) fn lose_no_more(&self) {
        self.nft(&["delete", "table", "inet", "kvx"]);
    }

    /// Sends packets no faster than this, on both sides, so that they queue.
    pub(crate) fn slow(&self, rate: &str) {
        let shape = ["qdisc", "add", "dev", "kvx0", "root", "tbf", "rate", rate];
        let shape = [&shape[..], &["burst", "64kb", "latency", "400ms"]].concat();
        run("tc", &shape).expect("tc");
        let there = ["netns", "exec", self.0.as_str(), "tc"];
        run("ip", &[&there[..], &shape[..]].concat()).expect("tc");
    }

    /// Takes the link up or down, for both sides.
    pub(crate) fn link(state: &str) {
        run("ip", &["link", "set", "kvx0", state]).expect("ip");
    }
}

/// Runs a test between two networks: in this process, if it is inside the first one, and otherwise
/// in one that is.
pub(crate) fn between(test: &str, act: impl FnOnce(&Far)) {
    match std::env::var(INSIDE) {
        Ok(there) => act(&Far(there)),
        Err(_) => within_a_network(test),
    }
}
