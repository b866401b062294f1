//! Settings from flags, environment, file and defaults.

use std::path::PathBuf;
use std::time::Duration;

use kvxfer::config::{Config, ConfigBuilder, Row, Source};

use crate::args::{Trust, Tuning};
use crate::problem::Problem;
use crate::say;

/// The device that is always there.
pub(crate) const SOFT_NAME: &str = "soft";
/// Its names.
const SOFT: [&str; 2] = [SOFT_NAME, "soft0"];
/// Its paths.
const SOFT_PATHS: &str = "arena,process-vm,tcp";

/// Bounds of the heartbeat that follows from `--timeout`; the upper ones are the defaults.
const SHORTEST_SILENCE: Duration = Duration::from_millis(100);
const LONGEST_SILENCE: Duration = Duration::from_secs(5);
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// What an engine is started with, and where each setting came from.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) config: Config,
    rows: Vec<Row>,
}

/// A flag that gives a setting: the setting's key, what was typed, the value.
pub(crate) type Flag<'a> = (&'static str, &'a str, String);

/// The flag that more than one setting follows from.
const TIMEOUT: &str = "--timeout";
const HEARTBEAT_TIMEOUT: &str = "heartbeat_timeout";
const HEARTBEAT_INTERVAL: &str = "heartbeat_interval";

/// `--timeout` as it names them: a session that takes longer to come about is given up, and so is a
/// transfer.
fn limits(timeout: Duration) -> [Flag<'static>; 2] {
    ["connect_timeout", "transfer_timeout"].map(|key| (key, TIMEOUT, seconds(timeout)))
}

/// What `--timeout` means for a peer that falls silent, which is given up after three times
/// `heartbeat_timeout`.
fn heartbeat(timeout: Duration) -> [Flag<'static>; 2] {
    let silence = (timeout / 3).clamp(SHORTEST_SILENCE, LONGEST_SILENCE);
    let beat = (silence / 3).min(LONGEST_BEAT);
    [(HEARTBEAT_TIMEOUT, silence), (HEARTBEAT_INTERVAL, beat)]
        .map(|(key, time)| (key, TIMEOUT, seconds(time)))
}

fn seconds(time: Duration) -> String {
    format!("{}s", time.as_secs_f64())
}

impl Settings {
    /// Gathers them. Warnings go to standard error, if they are wanted.
    ///
    /// `timeout` is `--timeout`. The heartbeat follows from it where nobody has set it: the two values of
    /// one that somebody has are left as they are, since they have to fit each other.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, and [`kvxfer::config::ConfigError`].
    pub(crate) fn gather(
        tuning: &Tuning,
        trust: &Trust,
        more: &[Flag<'_>],
        timeout: Option<Duration>,
        warn: bool,
    ) -> anyhow::Result<Self> {
        let mut builder = ConfigBuilder::new();
        if let Some(given) = &tuning.kv_transfer_config {
            const FLAG: &str = "--kv-transfer-config";
            match given.strip_prefix('@') {
                Some(path) => {
                    let text = std::fs::read_to_string(path).map_err(|error| {
                        Problem::usage(format!("cannot read {path}"))
                            .with_evidence(error.to_string())
                            .with_fix(format!("give {FLAG} a JSON text, or @FILE"))
                    })?;
                    builder.json(&text, path)
                }
                None => builder.json(given, FLAG),
            }
            .map_err(kvxfer::Error::from)?;
        }
        builder.from_process_env().map_err(kvxfer::Error::from)?;
        let number = |value: u32| value.to_string();
        let path = |path: &PathBuf| path.display().to_string();
        let own: [Option<Flag<'_>>; 8] = [
            tuning
                .qp_per_transfer
                .map(|n| ("qp_per_transfer", "--qp-per-transfer", number(n))),
            tuning
                .post_batch_size
                .map(|n| ("post_batch_size", "--post-batch-size", n.to_string())),
            tuning
                .tx_depth
                .map(|n| ("max_send_wr", "--tx-depth", number(n))),
            tuning
                .threads
                .map(|n| ("num_worker_threads", "--threads", number(n))),
            tuning
                .fence
                .as_ref()
                .map(|when| ("fence", "--fence", when.clone())),
            tuning
                .gpu_workgroups
                .map(|n| ("gpu_workgroups", "--gpu-workgroups", number(n))),
            trust
                .secret_file
                .as_ref()
                .map(|file| ("secret_file", "--secret-file", path(file))),
            trust.allow_unauthenticated.then(|| {
                (
                    "allow_unauthenticated",
                    "--allow-unauthenticated",
                    "true".to_owned(),
                )
            }),
        ];
        let limits = timeout.map(limits);
        let mut flags = |flags: &mut dyn Iterator<Item = &Flag<'_>>| {
            for (key, flag, value) in flags {
                builder.flag(key, flag, value)?;
            }
            builder.explain()
        };
        let path_is_given = more.iter().any(|(key, _, _)| *key == "path");
        let device = device(tuning, path_is_given);
        let path = more.iter().find(|(key, _, _)| *key == "path");
        if let (Some(nic), Some((_, _, path))) = (&tuning.nic.device, path)
            && !is_soft(nic)
            && path != "rdma"
            && path != "auto"
        {
            return Err(Problem::usage(format!("{nic} has no path {path}"))
                .with_fix("leave --path out, or say --device soft")
                .into());
        }
        let given = own.iter().flatten().chain(&device).chain(more);
        let mut rows =
            flags(&mut given.chain(limits.iter().flatten())).map_err(kvxfer::Error::from)?;
        let heartbeat_is_set = rows.iter().any(|row| {
            [HEARTBEAT_TIMEOUT, HEARTBEAT_INTERVAL].contains(&row.key.as_str())
                && row.source != Source::Default
        });
        if let Some(timeout) = timeout.filter(|_| !heartbeat_is_set) {
            rows = flags(&mut heartbeat(timeout).iter()).map_err(kvxfer::Error::from)?;
        }
        for warning in builder.warnings().iter().filter(|_| warn) {
            say::aside(format_args!("kvxfer: warning: {warning}"));
        }
        Ok(Self {
            config: builder.build().map_err(kvxfer::Error::from)?,
            rows,
        })
    }

    /// Reads the secret, if there is one, and says what is wrong with its file. It is read again by
    /// the engine: this is for a target that would be started for nothing, and to warn once.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub(crate) fn check_secret(&self) -> Result<(), kvxfer::Error> {
        if let Some(file) = &self.config.secret_file {
            for warning in &kvxfer::wire::Secret::from_file(file)?.warnings {
                say::aside(format_args!("kvxfer: warning: {warning}"));
            }
        }
        Ok(())
    }

    /// A setting as it is written.
    pub(crate) fn shown(&self, key: &str) -> String {
        let row = self.rows.iter().find(|row| row.key == key);
        row.map(|row| row.value.clone()).unwrap_or_default()
    }

    /// `--explain-config`: every setting, where it came from, and what else there is to know.
    ///
    /// # Errors
    ///
    /// Standard output does not take it.
    pub(crate) fn explain(&self) -> anyhow::Result<()> {
        let width = |cell: fn(&Row) -> String| {
            let widths = self.rows.iter().map(|row| cell(row).chars().count());
            widths.max().unwrap_or(0)
        };
        let value = |row: &Row| match row.value.as_str() {
            "" => "-".to_owned(),
            value => value.to_owned(),
        };
        let key_width = width(|row| row.key.clone());
        let value_width = width(value);
        let mut text = String::new();
        for row in &self.rows {
            let note = match row.note.as_str() {
                "" => String::new(),
                note => format!(" ({note})"),
            };
            let line = format!(
                "{:key_width$}  {:value_width$}  {}{note}",
                row.key,
                value(row),
                row.source
            );
            text.push_str(line.trim_end());
            text.push('\n');
        }
        say::result(&text)?;
        Ok(())
    }
}

/// Whether this names the device that is always there.
pub(crate) fn is_soft(name: &str) -> bool {
    SOFT.contains(&name)
}

/// The settings that options about the device give. The software device has paths of its own, and no
/// other option is about it.
fn device(tuning: &Tuning, path_is_given: bool) -> Vec<Flag<'static>> {
    let nic = &tuning.nic;
    let mut flags: Vec<Flag<'static>> = Vec::new();
    match nic.device.as_deref() {
        Some(name) if is_soft(name) => {
            let paths = ("path", "--device", SOFT_PATHS.to_owned());
            flags.extend((!path_is_given).then_some(paths));
        }
        Some(names) => {
            flags.push(("rdma_devices", "--device", names.to_owned()));
            // All but some is no wish for one by itself.
            if names.starts_with('^') && !path_is_given {
                flags.push(("path", "--device", "rdma".to_owned()));
            }
        }
        None => {}
    }
    let number = |key, flag, value: Option<u32>| value.map(|n| (key, flag, n.to_string()));
    let numbers = [
        number("rdma_port", "--ib-port", tuning.ib_port.map(u32::from)),
        number(
            "rdma_gid_index",
            "--gid-index",
            nic.gid_index.map(u32::from),
        ),
        number("rdma_sl", "--sl", nic.sl.map(u32::from)),
        number("rdma_tc", "--tclass", nic.tclass.map(u32::from)),
        number("rdma_mtu", "--mtu", nic.mtu),
    ];
    flags.extend(numbers.into_iter().flatten());
    flags
}

impl Tuning {
    /// The options about the device, for a target process; what the path says goes its own way.
    pub(crate) fn device_options(&self) -> Vec<String> {
        let flags = device(self, true).into_iter();
        flags
            .flat_map(|(_, flag, value)| [flag.to_owned(), value])
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Nic;

    fn options(name: &str) -> Tuning {
        Tuning {
            nic: Nic {
                device: Some(name.to_owned()),
                gid_index: Some(3),
                ..Nic::default()
            },
            ..Tuning::default()
        }
    }

    #[test]
    fn the_software_device_is_meant_by_its_paths() {
        let flags = device(&options("soft0"), false);
        assert_eq!(flags[0], ("path", "--device", SOFT_PATHS.to_owned()));
        let flags = device(&options("soft"), true);
        assert!(flags.iter().all(|(key, _, _)| *key != "path"), "{flags:?}");
    }

    #[test]
    fn a_target_gets_the_options_of_a_nic() {
        let given = options("mlx5_0,mlx5_1").device_options();
        assert_eq!(given, ["--device", "mlx5_0,mlx5_1", "--gid-index", "3"]);
    }
}
