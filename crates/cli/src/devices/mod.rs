//! `kvxfer devices`: which NICs and GPUs there are, which NIC would be taken, what can be moved, and why not the rest.

mod gpus;
mod moves;
mod registers;
mod report;
mod soft;
mod text;

use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::process::ExitCode;

use kvxfer::config::{Config, ConfigBuilder, Source};
use kvxfer_verbs::{Error, GidFault, NoRdma, Place, PortFault, PortRanking, RdmaDevice};

use crate::args::DevicesArgs;
use crate::output;
use crate::problem::{Exit, Problem};
use crate::say;
use report::{Asked, Rdma, Report};

/// Carries it out.
///
/// # Errors
///
/// Settings that are wrong, and NICs that were asked for and cannot be used; these are told after the
/// report.
pub(crate) fn run(args: &DevicesArgs) -> anyhow::Result<ExitCode> {
    let wish = Wish::of(args)?;
    let runtime = gpus::choice().map_err(|wrong| {
        Problem::usage("KVXFER_GPU cannot be used").with_evidence(wrong.to_string())
    })?;
    let (found, missing) = match kvxfer_verbs::rdma_devices() {
        Ok(devices) => (devices, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    wish.warn_of_absent(&found);
    let gids: Vec<_> = wish.peer.iter().copied().map(gid).collect();
    let ranking = kvxfer::devices::rank(&found, &wish.config, wish.near.as_ref(), &gids);
    let usable = ranking.usable.iter().map(|port| port.device.name.as_str());
    let mut usable: Vec<&str> = usable.collect();
    usable.sort_unstable();
    usable.dedup();
    let report = Report::new(
        wish.asked(args),
        missing.as_ref().map(Rdma::missing).unwrap_or_default(),
        &found,
        &ranking,
        soft::look(),
        gpus::look(runtime, &found, &usable),
    );
    let text = match args.json {
        true => output::line(&report)?,
        false => text::text(&report),
    };
    say::result(&text)?;
    let unmet = wish.unmet(&found, missing.as_ref(), &ranking);
    match unmet {
        Some(problem) => Err(problem.into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// What is asked of the choice.
struct Wish {
    config: Config,
    /// The list of devices as settings write it.
    list: Option<String>,
    /// Where the list of devices and the GID's index came from.
    list_from: Source,
    index_from: Source,
    near: Option<Place>,
    peer: Vec<IpAddr>,
}

impl Wish {
    fn of(args: &DevicesArgs) -> anyhow::Result<Self> {
        let mut builder = ConfigBuilder::new();
        let mut gather = || {
            builder.from_process_env()?;
            if let Some(list) = &args.device {
                builder.flag("rdma_devices", "--device", list)?;
            }
            if let Some(index) = args.gid_index {
                builder.flag("rdma_gid_index", "--gid-index", &index.to_string())?;
            }
            Ok((builder.build()?, builder.explain()?))
        };
        let (config, rows) = gather().map_err(kvxfer::Error::Config)?;
        for warning in builder.warnings() {
            say::aside(format_args!("kvxfer: warning: {warning}"));
        }
        let row = |key: &str| rows.iter().find(|row| row.key == key);
        let source = |key| row(key).map_or(Source::Default, |row| row.source.clone());
        let list = row("rdma_devices").map(|row| row.value.clone());
        Ok(Self {
            list: list.filter(|list| !list.is_empty()),
            list_from: source("rdma_devices"),
            index_from: source("rdma_gid_index"),
            config,
            near: args.near.as_deref().map(near).transpose()?,
            peer: args
                .peer
                .as_deref()
                .map(resolved)
                .transpose()?
                .unwrap_or_default(),
        })
    }

    fn asked(&self, args: &DevicesArgs) -> Asked {
        Asked {
            version: env!("CARGO_PKG_VERSION"),
            rdma_devices: self.list.clone(),
            rdma_gid_index: u32::try_from(self.config.rdma_gid_index).ok(),
            near: args.near.clone(),
            peer: args.peer.clone(),
            peer_addresses: self.peer.clone(),
        }
    }

    /// A NIC that is left out under a name that none has is one that is used.
    fn warn_of_absent(&self, found: &[RdmaDevice]) {
        let filter = self.config.rdma_devices.as_ref();
        let names = filter.filter(|f| f.is_exclusion()).map(|f| f.names());
        for name in names.unwrap_or_default() {
            if !found.is_empty() && !found.iter().any(|device| device.name == *name) {
                let from = &self.list_from;
                say::aside(format_args!(
                    "kvxfer: warning: there is no {name} to leave out ({from})"
                ));
            }
        }
    }

    /// NICs that are asked for by name. The software device is no NIC, and there.
    fn listed(&self) -> impl Iterator<Item = &str> {
        let filter = self.config.rdma_devices.as_ref();
        let names = filter.filter(|f| !f.is_exclusion()).map(|f| f.names());
        let names = names.unwrap_or_default().iter().map(String::as_str);
        names.filter(|name| !crate::run::is_soft(name))
    }

    /// What was asked for and is not to be had.
    fn unmet(
        &self,
        found: &[RdmaDevice],
        missing: Option<&Error>,
        ranking: &PortRanking<'_>,
    ) -> Option<Problem> {
        let from = &self.list_from;
        let absent: Vec<&str> = self
            .listed()
            .filter(|name| !found.iter().any(|device| device.name == *name))
            .collect();
        if !absent.is_empty() {
            let absent = absent.join(", ");
            // Where libibverbs gives none, the kernel may have it all the same.
            let cause = match missing {
                Some(_) => format!("no NIC {absent} can be had ({from})"),
                None => format!("this machine has no NIC {absent} ({from})"),
            };
            let problem = Problem::new(Exit::Device, cause);
            let there: Vec<&str> = found.iter().map(|device| device.name.as_str()).collect();
            return Some(match missing {
                Some(error) => problem
                    .with_evidence(error.to_string())
                    .with_fix("set that right, or ask for no NIC: the software device is there"),
                None => problem
                    .with_evidence(format!("it has {}", there.join(", ")))
                    .with_fix("name one of these"),
            });
        }
        let usable = |name: &str| ranking.usable.iter().any(|port| port.device.name == name);
        let unusable: Vec<&str> = self.listed().filter(|name| !usable(name)).collect();
        if !unusable.is_empty() {
            let cause = format!("{} cannot be used ({from})", unusable.join(", "));
            let problem = because(Problem::new(Exit::Device, cause), ranking, |name| {
                unusable.contains(&name)
            });
            return Some(problem.with_fix("set that right, or ask for another NIC"));
        }
        let no_such_index =
            |fault: &PortFault<'_>| matches!(fault, PortFault::Gid(GidFault::NoSuchIndex { .. }));
        let lost =
            ranking.usable.is_empty() && ranking.unusable.iter().any(|p| no_such_index(&p.fault));
        if lost {
            let (index, from) = (self.config.rdma_gid_index, &self.index_from);
            let cause = format!("no NIC can be used with GID {index} ({from})");
            let problem = because(Problem::new(Exit::Device, cause), ranking, |_| true);
            return Some(problem.with_fix("take an index that is there, or let it be chosen"));
        }
        None
    }
}

/// Adds why ports cannot be used, of the devices that are meant.
fn because(problem: Problem, ranking: &PortRanking<'_>, meant: impl Fn(&str) -> bool) -> Problem {
    let ports = ranking.unusable.iter();
    let ports = ports.filter(|port| meant(&port.device.name));
    ports.fold(problem, |problem, port| {
        let name = &port.device.name;
        problem.with_evidence(match port.number {
            Some(number) => format!("{name} port {number}: {}", port.fault),
            None => format!("{name}: {}", port.fault),
        })
    })
}

/// A PCI address or the number of a NUMA node.
fn near(text: &str) -> Result<Place, Problem> {
    if let Ok(node) = text.parse() {
        return Ok(Place::on_node(node));
    }
    Place::of_pci(text).ok_or_else(|| {
        Problem::usage(format!("this machine has no PCI device {text:?}"))
            .with_evidence(format!("/sys/bus/pci/devices has no {text:?}"))
            .with_fix("say an address with its domain (`lspci -D`), or the number of a NUMA node")
    })
}

fn resolved(host: &str) -> Result<Vec<IpAddr>, kvxfer::Error> {
    let failed = |source| kvxfer::Error::Resolve {
        address: host.to_owned(),
        source,
    };
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    let found = (host, 0).to_socket_addrs().map_err(failed)?;
    let mut addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    addresses.dedup();
    match addresses.is_empty() {
        true => Err(failed(io::ErrorKind::NotFound.into())),
        false => Ok(addresses),
    }
}

/// The GID that an address has on RoCE.
fn gid(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

impl Rdma {
    fn missing(error: &Error) -> Self {
        let (missing, why) = match error {
            Error::NoRdma(fault) => {
                let missing = match fault {
                    NoRdma::Library { .. } => "library",
                    NoRdma::Symbol { .. } => "symbol",
                    NoRdma::Kernel { .. } => "kernel",
                    NoRdma::Device { .. } => "device",
                    _ => "other",
                };
                (missing, fault.to_string())
            }
            other => ("other", other.to_string()),
        };
        Self {
            missing: Some(missing),
            why: Some(why),
        }
    }
}
