//! Sizes, durations and addresses as people type them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The port of everything kvxfer, unless another is named.
pub(crate) const DEFAULT_PORT: u16 = 7301;

/// The longest duration that is taken: sums of a point in time and durations stay within the clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A number of bytes: `4096`, `4K`, `64KiB`, `1M`. K, M, G and T are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Size(pub(crate) u64);

/// What is wrong with a value on the command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadValue {
    #[error("`{0}` is no size: say 4096, 4K, 64KiB, 1M or 2G (powers of 1024)")]
    Size(String),
    #[error("`{0}` counts in powers of 1000: say KiB, MiB or GiB, or just K, M or G")]
    Decimal(String),
    #[error("a size of 0 moves nothing")]
    Zero,
    #[error("`{0}` is more than 64 bits hold")]
    TooLarge(String),
    #[error("`{0}` is no duration: say 30, 30s, 500ms or 2m")]
    Duration(String),
    #[error("a duration of 0 is over before it begins")]
    NoTime,
    #[error("`{0}` is too long: at most 365 days, which are {seconds} s", seconds = LONGEST.as_secs())]
    TooLong(String),
    #[error("`{0}` is no address: say HOST, HOST:PORT or [IPV6]:PORT")]
    Address(String),
    #[error("`{0}` is no rate: say how many gigabits a second, such as 80 or 12.5")]
    Rate(String),
}

impl FromStr for Size {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::Size(text.to_owned());
        let trimmed = text.trim();
        let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = trimmed.split_at(digits);
        if number.is_empty() {
            return Err(bad());
        }
        let too_large = || BadValue::TooLarge(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_large())?;
        let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            "kb" | "mb" | "gb" | "tb" => return Err(BadValue::Decimal(text.to_owned())),
            _ => return Err(bad()),
        };
        if number == 0 {
            return Err(BadValue::Zero);
        }
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(too_large)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Seconds, or a number with `s`, `ms` or `m`; not zero, and at most [`LONGEST`].
pub(crate) fn duration(text: &str) -> Result<Duration, BadValue> {
    let bad = || BadValue::Duration(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let scale = match unit {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        _ => return Err(bad()),
    };
    let number: f64 = number.trim_end().parse().map_err(|_| bad())?;
    let seconds = number * scale;
    if seconds.is_finite() && seconds > LONGEST.as_secs_f64() {
        return Err(BadValue::TooLong(text.to_owned()));
    }
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| bad())?;
    if duration.is_zero() {
        return Err(BadValue::NoTime);
    }
    Ok(duration)
}

/// Gigabits a second: a finite number above zero.
pub(crate) fn rate(text: &str) -> Result<f64, BadValue> {
    match text.trim().parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err(BadValue::Rate(text.to_owned())),
    }
}

/// Where a server listens: a name or number, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl FromStr for Address {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::Address(text.to_owned());
        let port = |port: &str| -> Result<u16, BadValue> {
            // `parse` would take "+1".
            let digits = port.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| port.parse().ok()).flatten().ok_or_else(bad)
        };
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            match rest.strip_prefix(':') {
                Some(number) => (host, port(number)?),
                None if rest.is_empty() => (host, DEFAULT_PORT),
                None => return Err(bad()),
            }
        } else if text.parse::<std::net::Ipv6Addr>().is_ok() {
            (text, DEFAULT_PORT)
        } else {
            match text.split_once(':') {
                Some((host, number)) => (host, port(number)?),
                None => (text, DEFAULT_PORT),
            }
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_:%".contains(c);
        if host.is_empty() || host.starts_with('-') || !host.chars().all(plain) {
            return Err(bad());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, wanted) in [
            ("1", 1),
            ("4K", 4096),
            ("4k", 4096),
            (" 64KiB ", 65536),
            ("1M", 1 << 20),
            ("3 GiB", 3 << 30),
            ("2T", 2 << 40),
            ("512B", 512),
        ] {
            assert_eq!(text.parse(), Ok(Size(wanted)), "{text}");
        }
        for text in ["", "K", "4.5K", "-1", "4X", "0x10", "4KiBs", "é"] {
            assert_eq!(
                text.parse::<Size>(),
                Err(BadValue::Size(text.into())),
                "{text}"
            );
        }
        assert_eq!("0".parse::<Size>(), Err(BadValue::Zero));
        assert_eq!(
            "64KB".parse::<Size>(),
            Err(BadValue::Decimal("64KB".into()))
        );
        for text in ["99999999999999999999", "99999999T"] {
            assert_eq!(text.parse::<Size>(), Err(BadValue::TooLarge(text.into())));
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, millis) in [
            ("30", 30_000),
            ("1.5s", 1500),
            ("500ms", 500),
            ("2m", 120_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "-1", "1h", "nan", "inf", "1e9", "1e400"] {
            assert_eq!(
                duration(text),
                Err(BadValue::Duration(text.into())),
                "{text}"
            );
        }
        assert_eq!(duration("0"), Err(BadValue::NoTime));
        for text in ["31536000", "525600m"] {
            assert_eq!(duration(text), Ok(LONGEST), "{text}");
        }
        for text in [
            "31536001",
            "525601m",
            "10000000000000000000",
            "18446744073709551615ms",
        ] {
            let error = duration(text).expect_err(text);
            assert_eq!(error, BadValue::TooLong(text.into()));
            assert!(error.to_string().contains("31536000 s"), "{error}");
        }
    }

    #[test]
    fn rates_are_above_zero() {
        assert_eq!(rate("12.5"), Ok(12.5));
        for text in ["0", "-1", "nan", "inf", "x", ""] {
            assert_eq!(rate(text), Err(BadValue::Rate(text.into())), "{text}");
        }
    }

    #[test]
    fn addresses_have_a_default_port() {
        for (text, host, port) in [
            ("node7", "node7", 7301),
            ("node7.lan:80", "node7.lan", 80),
            ("10.0.0.1", "10.0.0.1", 7301),
            ("::1", "::1", 7301),
            ("[::1]", "::1", 7301),
            ("[fe80::2]:9", "fe80::2", 9),
        ] {
            let host = host.to_owned();
            assert_eq!(text.parse(), Ok(Address { host, port }), "{text}");
        }
        for text in [
            "", ":80", "a:", "a:b", "a:70000", "a:+1", "[::1", "[::1]x", "[a]:1", "-x", "a b",
        ] {
            assert_eq!(
                text.parse::<Address>(),
                Err(BadValue::Address(text.into())),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_what_was_meant(bytes in 1_u64.., port: u16) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
            for host in ["a-b.c", "::1", "10.1.2.3"] {
                let address = Address { host: host.into(), port };
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }

        #[test]
        fn nothing_typed_is_a_panic(text in ".{0,40}") {
            let _ = (text.parse::<Size>(), duration(&text), text.parse::<Address>(), rate(&text));
        }
    }
}
