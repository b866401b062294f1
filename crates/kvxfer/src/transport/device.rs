//! Which devices an engine stands on: the software device, or the RDMA devices that the configuration
//! asks for.

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use kvxfer_verbs::{
    Context, PortRanking, RdmaConfig, RtsAttr, SoftConfig, UsablePort, open_rdma, open_soft,
    rdma_devices,
};

use crate::config::{Config, DeviceFilter, PathKind};
use crate::devices;
use crate::error::{Error, chain};
use crate::wire::limits;

/// Retry settings of soft queue pairs: 4.096 us × 2^18 is 1.07 s a try. Transfers have deadlines of
/// their own; these only end what nobody waits for.
const SOFT_RTS: RtsAttr = RtsAttr {
    timeout: 18,
    retry_cnt: 7,
    rnr_retry: 7,
};

/// RDMA devices that one engine takes; more that are named are left alone.
const MAX_RAILS: usize = limits::RAILS;

/// Whether the configuration asks for an RDMA device: it allows no other path, beneath what is staged either, or
/// names devices. An engine that is left the choice takes the software device.
fn wants_rdma(config: &Config) -> bool {
    let named = config
        .rdma_devices
        .as_ref()
        .is_some_and(|d| !d.is_exclusion());
    let path = &config.path;
    let others = [
        PathKind::Arena,
        PathKind::ProcessVm,
        PathKind::Tcp,
        PathKind::Ipc,
    ];
    let alone = path.allows(PathKind::Rdma) && !others.iter().any(|other| path.allows(*other));
    let staged = path.allows(PathKind::Staged) && path.allows_beneath(PathKind::Rdma);
    alone || named && (path.allows(PathKind::Rdma) || staged)
}

/// The devices that an engine stands on, in the order of the configuration; never none.
#[derive(Debug)]
pub(crate) struct Opened {
    /// With the place that each has in the configuration.
    pub(crate) contexts: Vec<(u16, Context)>,
    /// Devices that the configuration names and that cannot be used, each with the reason.
    pub(crate) skipped: Vec<SkippedRail>,
}

/// A device that the configuration names and that an engine does without.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SkippedRail {
    /// Its name.
    pub device: String,
    /// Why it cannot be used.
    pub reason: String,
}

impl SkippedRail {
    pub(crate) fn new(device: &str, reason: &str) -> Self {
        Self {
            device: device.to_owned(),
            reason: reason.to_owned(),
        }
    }
}

/// Opens the devices, with what is to go wrong on the software device.
///
/// # Errors
///
/// [`Error::Verbs`], [`Error::RdmaDevice`], [`Error::NoRdmaPort`].
pub(crate) fn open_rails(config: &Config) -> Result<Opened, Error> {
    if wants_rdma(config) {
        return open_rdma_rails(config, MAX_RAILS);
    }
    if let Some(faults) = &config.faults {
        warn!(%faults, "faults on purpose: transfers will fail");
    }
    let mut device = SoftConfig::default();
    device.faults = config.faults.clone();
    Ok(Opened {
        contexts: vec![(0, open_soft(device)?)],
        skipped: Vec::new(),
    })
}

/// The first of the devices that [`open_rails`] opens.
///
/// # Errors
///
/// As [`open_rails`].
pub(crate) fn open_device(config: &Config) -> Result<Context, Error> {
    let opened = if wants_rdma(config) {
        open_rdma_rails(config, 1)?
    } else {
        open_rails(config)?
    };
    let none = Error::NoRdmaPort {
        candidates: Vec::new(),
    };
    let first = opened.contexts.into_iter().next();
    first.map(|(_, context)| context).ok_or(none)
}

/// Opens the RDMA devices that an engine of this configuration would stand on, if it asks for some, and
/// closes them again.
///
/// # Errors
///
/// [`Error::RdmaDevice`], [`Error::NoRdmaPort`].
pub fn check_device(config: &Config) -> Result<(), Error> {
    if wants_rdma(config) {
        open_rdma_rails(config, MAX_RAILS)?;
    }
    Ok(())
}

/// The best port of each device that the configuration names, open, or the best port of all where it
/// names none; no more than `most`.
fn open_rdma_rails(config: &Config, most: usize) -> Result<Opened, Error> {
    if config.faults.is_some() {
        warn!("faults are for the software device: none are made on this one");
    }
    let filter = config.rdma_devices.as_ref();
    let refused = |source| Error::RdmaDevice {
        asked: filter.map_or_else(|| "path rdma".to_owned(), ToString::to_string),
        source,
    };
    let there = rdma_devices().map_err(refused)?;
    let named = filter.filter(|filter| !filter.is_exclusion());
    let names = named.map_or(&[][..], DeviceFilter::names);
    let is_there = |name: &&String| !there.iter().any(|device| device.name == **name);
    if let Some(missing) = names.iter().find(is_there) {
        return Err(refused(kvxfer_verbs::Error::NoSuchDevice {
            device: missing.clone(),
            devices: there.iter().map(|device| device.name.clone()).collect(),
        }));
    }
    let ranking = devices::rank(&there, config, None, &[]);
    let port = u8::try_from(config.rdma_port).ok();
    let most = if names.is_empty() { 1 } else { most };
    let taken = taken(&ranking, port);
    if taken.is_empty() {
        return Err(Error::NoRdmaPort {
            candidates: unusable(&ranking, port),
        });
    }
    let mut opened = Opened {
        contexts: Vec::new(),
        skipped: Vec::new(),
    };
    for name in names {
        if !taken.iter().any(|usable| usable.device.name == *name) {
            let reasons = unusable(&ranking, port).into_iter();
            let own = reasons.filter(|(port, _)| port.split(' ').next() == Some(name));
            let reasons: Vec<String> = own.map(|(_, reason)| reason).collect();
            opened.skip(name, reasons.join("; "));
        }
    }
    let mut first = None;
    for usable in taken {
        if opened.contexts.len() == most {
            if most > 1 {
                opened.skip(
                    &usable.device.name,
                    format!("{most} devices are used, and no more"),
                );
            }
            continue;
        }
        match open_port(config, usable) {
            Ok(context) => {
                let place = names.iter().position(|name| *name == usable.device.name);
                let place = u16::try_from(place.unwrap_or(0)).unwrap_or(u16::MAX);
                opened.contexts.push((place, context));
            }
            Err(error) => {
                opened.skip(&usable.device.name, chain(&error));
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(source) if opened.contexts.is_empty() => Err(refused(source)),
        _ => Ok(opened),
    }
}

/// The first port that may be used of each device.
fn taken<'r, 'a>(ranking: &'r PortRanking<'a>, port: Option<u8>) -> Vec<&'r UsablePort<'a>> {
    let fits = |usable: &&UsablePort<'_>| port.is_none_or(|port| usable.number == port);
    let mut taken: Vec<&UsablePort<'_>> = Vec::new();
    for usable in ranking.usable.iter().filter(fits) {
        let new = |other: &&UsablePort<'_>| other.device.name != usable.device.name;
        if taken.iter().all(new) {
            taken.push(usable);
        }
    }
    taken
}

impl Opened {
    fn skip(&mut self, device: &str, reason: String) {
        warn!(device, reason, "RDMA device not used");
        self.skipped.push(SkippedRail {
            device: device.to_owned(),
            reason,
        });
    }
}

fn open_port(config: &Config, usable: &UsablePort<'_>) -> Result<Context, kvxfer_verbs::Error> {
    let mut rdma = RdmaConfig::new(&usable.device.name);
    rdma.port = Some(usable.number);
    rdma.gid_index = u32::try_from(config.rdma_gid_index).ok();
    rdma.mtu = u32::try_from(config.rdma_mtu).ok();
    rdma.service_level = config.rdma_sl.unwrap_or(0);
    rdma.traffic_class = config.rdma_tc.unwrap_or(0);
    rdma.hop_limit = byte(config.rdma_hop_limit);
    rdma.pkey_index = u16::try_from(config.rdma_pkey_index).unwrap_or(u16::MAX);
    let context = open_rdma(&rdma)?;
    info!(
        device = usable.device.name,
        port = usable.number,
        reason = usable.reason,
        "RDMA"
    );
    Ok(context)
}

/// Every port that is not used, and why.
fn unusable(ranking: &PortRanking<'_>, port: Option<u8>) -> Vec<(String, String)> {
    let name = |device: &str, number: Option<u8>| match number {
        Some(number) => format!("{device} port {number}"),
        None => device.to_owned(),
    };
    let other = ranking.usable.iter().filter_map(|usable| {
        let asked = port?;
        let name = name(&usable.device.name, Some(usable.number));
        Some((name, format!("port {asked} was asked for")))
    });
    let faults = ranking.unusable.iter().map(|unusable| {
        let name = name(&unusable.device.name, unusable.number);
        (name, chain(&unusable.fault))
    });
    other.chain(faults).collect()
}

/// The configuration holds such settings to what a byte can say.
fn byte(value: u32) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}

/// How queue pairs try again.
pub(crate) fn retries(rdma: bool, config: &Config) -> RtsAttr {
    if !rdma {
        return SOFT_RTS;
    }
    RtsAttr {
        timeout: byte(config.rdma_timeout),
        retry_cnt: byte(config.rdma_retry_cnt),
        rnr_retry: byte(config.rdma_rnr_retry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigBuilder;

    fn config(settings: &[(&str, &str)]) -> Config {
        let mut builder = ConfigBuilder::new();
        for (key, value) in settings {
            builder.flag(key, "a test", value).expect("a setting");
        }
        builder.build().expect("settings")
    }

    #[test]
    fn an_rdma_device_is_taken_where_it_is_asked_for() {
        let wants = |settings: &[(&str, &str)]| wants_rdma(&config(settings));
        assert!(!wants(&[]), "the engine has the choice");
        assert!(wants(&[("path", "rdma")]));
        assert!(wants(&[("path", "rdma,staged")]));
        assert!(!wants(&[("path", "staged")]));
        assert!(wants(&[("rdma_devices", "mlx5_0"), ("path", "staged")]));
        assert!(!wants(&[
            ("rdma_devices", "mlx5_0"),
            ("path", "tcp,staged")
        ]));
        assert!(wants(&[("rdma_devices", "mlx5_0,mlx5_1")]));
        assert!(
            !wants(&[("rdma_devices", "^mlx5_0")]),
            "nobody asked for one"
        );
        assert!(!wants(&[("rdma_devices", "mlx5_0"), ("path", "arena,tcp")]));
        assert!(wants(&[("rdma_devices", "^mlx5_0"), ("path", "rdma")]));
    }

    #[test]
    fn a_machine_without_rdma_says_what_is_missing() {
        if rdma_devices().is_ok() {
            // Here there is one.
            return;
        }
        let refused = open_device(&config(&[("path", "rdma")])).map(|_| ());
        let text = chain(&refused.expect_err("no RDMA here"));
        assert!(text.contains("no RDMA: "), "{text}");
    }
}
