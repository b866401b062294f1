//! Which device an engine stands on: the software device, or an RDMA device that the configuration
//! asks for.

use tracing::{info, warn};

use kvxfer_verbs::{
    Context, DeviceKind, PortRanking, RdmaConfig, RtsAttr, SoftConfig, UsablePort, open_rdma,
    open_soft, rdma_devices,
};

use crate::config::{Config, DeviceFilter, PathKind};
use crate::devices;
use crate::error::{Error, chain};

/// Retry settings of soft queue pairs: 4.096 us × 2^18 is 1.07 s a try. Transfers have deadlines of
/// their own; these only end what nobody waits for.
const SOFT_RTS: RtsAttr = RtsAttr {
    timeout: 18,
    retry_cnt: 7,
    rnr_retry: 7,
};

/// Whether the configuration asks for an RDMA device: it allows no other path, or names devices. An
/// engine that is left the choice takes the software device.
fn wants_rdma(config: &Config) -> bool {
    let named = config
        .rdma_devices
        .as_ref()
        .is_some_and(|d| !d.is_exclusion());
    config.path.forced() == Some(PathKind::Rdma) || named && config.path.allows(PathKind::Rdma)
}

/// Opens the device, with what is to go wrong on it.
///
/// # Errors
///
/// [`Error::Verbs`], [`Error::RdmaDevice`], [`Error::NoRdmaPort`].
pub(crate) fn open_device(config: &Config) -> Result<Context, Error> {
    if wants_rdma(config) {
        return open_rdma_device(config);
    }
    if let Some(faults) = &config.faults {
        warn!(%faults, "faults on purpose: transfers will fail");
    }
    let mut device = SoftConfig::default();
    device.faults = config.faults.clone();
    Ok(open_soft(device)?)
}

/// Opens the RDMA device that an engine of this configuration would stand on, if it asks for one, and
/// closes it again.
///
/// # Errors
///
/// [`Error::RdmaDevice`], [`Error::NoRdmaPort`].
pub fn check_device(config: &Config) -> Result<(), Error> {
    if wants_rdma(config) {
        open_rdma_device(config)?;
    }
    Ok(())
}

/// The best port that may be used, open.
fn open_rdma_device(config: &Config) -> Result<Context, Error> {
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
    let fits = |usable: &&UsablePort<'_>| port.is_none_or(|port| usable.number == port);
    let Some(best) = ranking.usable.iter().find(fits) else {
        return Err(Error::NoRdmaPort {
            candidates: unusable(&ranking, port),
        });
    };
    let mut rdma = RdmaConfig::new(&best.device.name);
    rdma.port = Some(best.number);
    rdma.gid_index = u32::try_from(config.rdma_gid_index).ok();
    rdma.mtu = u32::try_from(config.rdma_mtu).ok();
    rdma.service_level = config.rdma_sl.unwrap_or(0);
    rdma.traffic_class = config.rdma_tc.unwrap_or(0);
    rdma.hop_limit = byte(config.rdma_hop_limit);
    rdma.pkey_index = u16::try_from(config.rdma_pkey_index).unwrap_or(u16::MAX);
    let context = open_rdma(&rdma).map_err(refused)?;
    info!(
        device = best.device.name,
        port = best.number,
        reason = best.reason,
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

/// How the queue pairs of a device try again.
pub(crate) fn retries(context: &Context, config: &Config) -> RtsAttr {
    if context.device().kind != DeviceKind::Rdma {
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
