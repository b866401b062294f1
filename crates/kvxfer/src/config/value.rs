//! The types that settings have, how each is written, and the rules that bound them.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use kvxfer_verbs::FaultPlan;

use kvxfer_hipmem::gpu::{RuntimeChoice, RuntimeKind};

use crate::wire::{KvRole, PathKind};

/// A type that a setting can have. Every source (flag, environment, JSON) gives text.
pub(super) trait Setting: Sized {
    /// What a value looks like, for the words "expected …".
    const SYNTAX: &'static str;

    /// Reads a value; `None` when the text is not one.
    fn read(text: &str) -> Option<Self>;

    /// Writes it so that `read` takes it back; empty when nothing is set.
    fn show(&self) -> String;
}

/// What values of a setting are allowed.
pub(super) trait Rule<T> {
    /// Whether this one is.
    fn holds(&self, value: &T) -> bool;

    /// All of them, in words.
    fn allowed(&self) -> String;
}

/// Any value of the type.
pub(super) struct Any;

impl<T: Setting> Rule<T> for Any {
    fn holds(&self, _: &T) -> bool {
        true
    }

    fn allowed(&self) -> String {
        T::SYNTAX.into()
    }
}

/// Values within two bounds, both included.
pub(super) struct Within<T>(pub(super) T, pub(super) T);

impl<T: Setting + PartialOrd> Rule<T> for Within<T> {
    fn holds(&self, value: &T) -> bool {
        *value >= self.0 && *value <= self.1
    }

    fn allowed(&self) -> String {
        format!("{} from {} to {}", T::SYNTAX, self.0.show(), self.1.show())
    }
}

/// One special value with its meaning, or values within two bounds.
pub(super) struct Or<T>(
    pub(super) T,
    pub(super) &'static str,
    pub(super) T,
    pub(super) T,
);

impl<T: Setting + PartialOrd> Rule<T> for Or<T> {
    fn holds(&self, value: &T) -> bool {
        *value == self.0 || (*value >= self.2 && *value <= self.3)
    }

    fn allowed(&self) -> String {
        let [special, from, to] = [&self.0, &self.2, &self.3].map(Setting::show);
        format!(
            "{special} ({}), or {} from {from} to {to}",
            self.1,
            T::SYNTAX
        )
    }
}

/// A setting that may be absent, with a rule for when it is not.
pub(super) struct IfSet<R>(pub(super) R);

impl<T: Setting, R: Rule<T>> Rule<Option<T>> for IfSet<R> {
    fn holds(&self, value: &Option<T>) -> bool {
        value.as_ref().is_none_or(|v| self.0.holds(v))
    }

    fn allowed(&self) -> String {
        self.0.allowed()
    }
}

macro_rules! integers {
    ($($int:ty),+) => {$(
        impl Setting for $int {
            const SYNTAX: &'static str = "an integer";

            fn read(text: &str) -> Option<Self> {
                text.parse().ok()
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    )+};
}
integers!(u8, u16, u32, i32);

impl Setting for bool {
    const SYNTAX: &'static str = "true or false";

    fn read(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => None,
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for Duration {
    const SYNTAX: &'static str = "a duration (500ms, 30s, 8m, 1h; a bare number is seconds)";

    fn read(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text)?;
        let seconds = match unit {
            "us" => 1e-6,
            "ms" => 1e-3,
            "" | "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        let exact = Duration::try_from_secs_f64(number * seconds).ok()?;
        // Whole microseconds: a product such as 1.1 * 1e-3 is not to show its last bit.
        Some(Duration::from_micros(
            u64::try_from((exact.as_nanos() + 500) / 1000).ok()?,
        ))
    }

    fn show(&self) -> String {
        let us = self.as_micros();
        if us.is_multiple_of(1_000_000) {
            format!("{}s", us / 1_000_000)
        } else if us.is_multiple_of(1000) {
            format!("{}ms", us / 1000)
        } else {
            format!("{us}us")
        }
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Setting for Bytes {
    const SYNTAX: &'static str = "a size (bytes, or with K, M, G, T for powers of 1024)";

    fn read(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text)?;
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "ki" | "kib" => 10,
            "m" | "mi" | "mib" => 20,
            "g" | "gi" | "gib" => 30,
            "t" | "ti" | "tib" => 40,
            _ => return None,
        };
        number
            .parse::<u64>()
            .ok()?
            .checked_mul(1 << shift)
            .map(Bytes)
    }

    fn show(&self) -> String {
        match self.0 {
            0 => "0".into(),
            n if n.is_multiple_of(1 << 30) => format!("{}G", n >> 30),
            n if n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
            n if n.is_multiple_of(1 << 10) => format!("{}K", n >> 10),
            n => n.to_string(),
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.show())
    }
}

/// The number in front and the unit behind; `None` when there is no number.
fn split_unit(text: &str) -> Option<(&str, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (!number.is_empty()).then(|| (number, unit.trim_start()))
}

/// Words that stand for the variants of an enum.
macro_rules! words {
    ($type:ident, $syntax:literal, $($word:literal => $variant:ident),+) => {
        impl Setting for $type {
            const SYNTAX: &'static str = $syntax;

            fn read(text: &str) -> Option<Self> {
                match text {
                    $($word => Some(Self::$variant),)+
                    _ => None,
                }
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }

    };
}

words!(KvRole, "kv_producer, kv_consumer or kv_both",
    "kv_producer" => Producer, "kv_consumer" => Consumer, "kv_both" => Both);

impl Setting for RuntimeChoice {
    const SYNTAX: &'static str = "auto, hip, cuda or host";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn show(&self) -> String {
        match self {
            Self::Auto => "auto",
            Self::Only(RuntimeKind::Hip) => "hip",
            Self::Only(RuntimeKind::Cuda) => "cuda",
            Self::Only(RuntimeKind::Host) => "host",
        }
        .to_owned()
    }
}

/// Which fences there are around what GPUs read and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FencePolicy {
    /// Those that the kind of memory needs.
    On,
    /// None. What is read may be stale.
    Off,
    /// Those that are needed, and checksums of everything that has moved are compared.
    Verify,
}

impl fmt::Display for FencePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Verify => "verify",
        })
    }
}

words!(FencePolicy, "on, off or verify",
    "on" => On, "off" => Off, "verify" => Verify);

/// Where the blocks of peers' bandwidth tests lie on this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BenchPlace {
    /// As the peer's: in host memory, or on a GPU.
    Peer,
    /// In host memory.
    Host,
    /// On a GPU.
    Gpu,
}

impl fmt::Display for BenchPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peer => "peer",
            Self::Host => "host",
            Self::Gpu => "gpu",
        })
    }
}

words!(BenchPlace, "peer, host or gpu", "peer" => Peer, "host" => Host, "gpu" => Gpu);

/// The paths that a configuration can name, in the order in which they are shown.
const PATHS: [PathKind; 6] = [
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
    PathKind::Rdma,
    PathKind::Ipc,
    PathKind::Staged,
];

/// Those that queue pairs go by, beneath what is staged too.
const BENEATH: [PathKind; 4] = [
    PathKind::Arena,
    PathKind::ProcessVm,
    PathKind::Tcp,
    PathKind::Rdma,
];

fn path_named(name: &str) -> Option<PathKind> {
    PATHS.into_iter().find(|path| path.name() == name)
}

/// The ways that may be used.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PathSet(Vec<PathKind>);

impl PathSet {
    /// All ways; the best usable one is chosen for each peer.
    #[must_use]
    pub fn auto() -> PathSet {
        PathSet(PATHS.to_vec())
    }

    /// One way and no other.
    #[must_use]
    pub fn only(path: PathKind) -> PathSet {
        PathSet(vec![path])
    }

    /// These ways.
    #[must_use]
    pub fn some(paths: impl IntoIterator<Item = PathKind>) -> PathSet {
        let mut paths: Vec<PathKind> = paths.into_iter().collect();
        paths.sort_unstable();
        paths.dedup();
        PathSet(paths)
    }

    /// Whether this one may be used.
    #[must_use]
    pub fn allows(&self, path: PathKind) -> bool {
        self.0.contains(&path)
    }

    /// Whether what is staged may go over this one: where none that queue pairs go by is named, any may.
    #[must_use]
    pub fn allows_beneath(&self, path: PathKind) -> bool {
        let named = BENEATH.iter().any(|path| self.allows(*path));
        BENEATH.contains(&path) && (!named || self.allows(path))
    }

    /// The only one that may be used, if it is one.
    #[must_use]
    pub fn forced(&self) -> Option<PathKind> {
        match self.0.as_slice() {
            [path] => Some(*path),
            _ => None,
        }
    }
}

impl Setting for PathSet {
    const SYNTAX: &'static str = "auto, or some of arena, process-vm, tcp, rdma, ipc, staged";

    fn read(text: &str) -> Option<Self> {
        if text == "auto" {
            return Some(PathSet::auto());
        }
        let paths = list(text).map(path_named).collect::<Option<Vec<_>>>()?;
        (!paths.is_empty()).then(|| PathSet::some(paths))
    }

    fn show(&self) -> String {
        if self.0 == PATHS {
            return "auto".into();
        }
        self.0
            .iter()
            .map(|p| p.name())
            .collect::<Vec<_>>()
            .join(",")
    }
}

/// The parts of a comma-separated list.
fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim)
}

/// Which RDMA devices may be used: all, only those named, or with `^` all but those named.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct DeviceFilter {
    except: bool,
    names: Vec<String>,
}

impl DeviceFilter {
    /// Whether a device of this name may be used.
    #[must_use]
    pub fn allows(&self, name: &str) -> bool {
        self.place(name).is_some()
    }

    /// The place of a device among those that may be used, the preferred first; `None` where it may
    /// not be used. Devices that are not named have the same place.
    #[must_use]
    pub fn place(&self, name: &str) -> Option<usize> {
        let listed = self.names.iter().position(|n| n == name);
        match listed {
            _ if self.names.is_empty() => Some(0),
            Some(_) if self.except => None,
            None if self.except => Some(0),
            listed => listed,
        }
    }

    /// Whether the names are those of the devices that may not be used.
    #[must_use]
    pub fn is_exclusion(&self) -> bool {
        self.except
    }

    /// The names given, in their order.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

impl fmt::Display for DeviceFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let except = if self.except { "^" } else { "" };
        write!(f, "{except}{}", self.names.join(","))
    }
}

impl Setting for DeviceFilter {
    const SYNTAX: &'static str =
        "device names (rdma0,rdma5), or ^ and the devices not to use (^rdma0)";

    fn read(text: &str) -> Option<Self> {
        let (except, names) = match text.strip_prefix('^') {
            Some(names) => (true, names),
            None => (false, text),
        };
        let name = |n: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            (!n.is_empty() && n.len() < 64 && n.chars().all(plain)).then(|| n.to_owned())
        };
        Some(DeviceFilter {
            except,
            names: list(names).map(name).collect::<Option<_>>()?,
        })
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// Where to listen: a host, and a port if it is not the setting `port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Listen {
    /// An address or a name.
    pub host: String,
    /// 0 lets the system choose.
    pub port: Option<u16>,
}

impl Listen {
    /// Whether the host is a loopback address or `localhost`. Another name counts as reachable
    /// from elsewhere: what it resolves to is not known here.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl Setting for Listen {
    const SYNTAX: &'static str = "HOST, HOST:PORT or [IPV6]:PORT";

    fn read(text: &str) -> Option<Self> {
        let is_name = |h: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            !h.is_empty() && h.len() <= 253 && h.chars().all(plain)
        };
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Some(Listen {
                host: ip.to_string(),
                port: None,
            });
        }
        if let Ok(addr) = text.parse::<std::net::SocketAddr>() {
            return Some(Listen {
                host: addr.ip().to_string(),
                port: Some(addr.port()),
            });
        }
        match text.split_once(':') {
            None if is_name(text) => Some(Listen {
                host: text.into(),
                port: None,
            }),
            Some((host, port)) if is_name(host) => Some(Listen {
                host: host.into(),
                port: Some(port.parse().ok()?),
            }),
            _ => None,
        }
    }

    fn show(&self) -> String {
        match self.port {
            None => self.host.clone(),
            Some(port) if self.host.contains(':') => format!("[{}]:{port}", self.host),
            Some(port) => format!("{}:{port}", self.host),
        }
    }
}

impl Setting for IpAddr {
    const SYNTAX: &'static str = "an IP address";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for PathBuf {
    const SYNTAX: &'static str = "a file";

    fn read(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| text.into())
    }

    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl Setting for String {
    const SYNTAX: &'static str = "a name of 1 to 256 characters";

    fn read(text: &str) -> Option<Self> {
        (!text.is_empty() && text.len() <= 256).then(|| text.into())
    }

    fn show(&self) -> String {
        self.clone()
    }
}

impl Setting for FaultPlan {
    const SYNTAX: &'static str = "faults of the software device (seed=7,delay=0.01:5ms,drop=0.001)";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl<T: Setting> Setting for Option<T> {
    const SYNTAX: &'static str = T::SYNTAX;

    fn read(text: &str) -> Option<Self> {
        T::read(text).map(Some)
    }

    fn show(&self) -> String {
        self.as_ref().map(Setting::show).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round<T: Setting + PartialEq + fmt::Debug>(text: &str, shown: &str) {
        let value = T::read(text).unwrap_or_else(|| panic!("{text:?} is not read"));
        assert_eq!(value.show(), shown);
        assert_eq!(T::read(shown).as_ref(), Some(&value));
    }

    #[test]
    fn written_forms() {
        round::<Duration>("30", "30s");
        round::<Duration>("1.1ms", "1100us");
        round::<Duration>("8m", "480s");
        round::<Bytes>("4096", "4K");
        round::<Bytes>("1GiB", "1G");
        round::<Bytes>("3", "3");
        round::<PathSet>("auto", "auto");
        round::<PathSet>("tcp, arena", "arena,tcp");
        round::<DeviceFilter>("rdma0,rdma5", "rdma0,rdma5");
        round::<DeviceFilter>("^rdma0", "^rdma0");
        round::<Listen>("[::1]:7301", "[::1]:7301");
        round::<Listen>("::1", "::1");
        round::<Listen>("node-3:1", "node-3:1");
        round::<bool>("YES", "true");
    }

    #[test]
    fn not_values() {
        assert_eq!(Duration::read("-1"), None);
        assert_eq!(Duration::read("1e300"), None);
        assert_eq!(Duration::read("9".repeat(400).as_str()), None);
        assert_eq!(Duration::read("5 parsecs"), None);
        assert_eq!(Bytes::read("99999999999999G"), None);
        assert_eq!(Bytes::read("1.5G"), None);
        assert_eq!(PathSet::read(""), None);
        assert_eq!(PathSet::read("arena,warp"), None);
        assert_eq!(DeviceFilter::read("rdma0,"), None);
        assert_eq!(DeviceFilter::read("^"), None);
        assert_eq!(Listen::read("host:99999"), None);
        assert_eq!(Listen::read("a b"), None);
    }

    #[test]
    fn filters() {
        let only = DeviceFilter::read("rdma0,rdma5").expect("a list");
        assert!(only.allows("rdma5") && !only.allows("rdma1"));
        let but = DeviceFilter::read("^rdma0").expect("a list");
        assert!(!but.allows("rdma0") && but.allows("rdma1"));
        assert!(DeviceFilter::default().allows("rdma9"));
        // Names are preferred in the order in which they are given.
        let order = ["rdma0", "rdma5", "rdma1"].map(|name| only.place(name));
        assert_eq!(order, [Some(0), Some(1), None]);
        assert_eq!((but.place("rdma0"), but.place("rdma1")), (None, Some(0)));
    }
}
