//! What `cargo xtask vm` is asked for.

use std::ops::RangeInclusive;

/// How large the guest is and how long it may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Options {
    /// From the start of the machine to the end of the command.
    pub(crate) seconds: u32,
    pub(crate) cpus: u32,
    /// In MiB.
    pub(crate) memory: u32,
    /// Whether `ra` and `rb` are there beside `rxe0`.
    pub(crate) two_hosts: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seconds: 300,
            cpus: 2,
            memory: 3072,
            two_hosts: false,
        }
    }
}

/// The options and the command behind them.
///
/// # Errors
///
/// What is wrong, for people to read.
pub(super) fn parse<'a>(mut args: &'a [&'a str]) -> Result<(Options, &'a [&'a str]), String> {
    let mut options = Options::default();
    while let [first, rest @ ..] = args {
        args = rest;
        match *first {
            "--" => break,
            "--two-hosts" => options.two_hosts = true,
            "--seconds" => options.seconds = number(first, &mut args, 1..=86_400)?,
            "--cpus" => options.cpus = number(first, &mut args, 1..=64)?,
            "--memory" => options.memory = number(first, &mut args, 512..=1 << 20)?,
            other if other.starts_with('-') => return Err(format!("{other}: no such option")),
            other => return Err(format!("{other}: the command comes after `--`")),
        }
    }
    if args.is_empty() {
        return Err("no command".into());
    }
    Ok((options, args))
}

fn number(name: &str, args: &mut &[&str], range: RangeInclusive<u32>) -> Result<u32, String> {
    let [value, rest @ ..] = *args else {
        return Err(format!("{name} needs a number"));
    };
    *args = rest;
    let number = value.parse().ok().filter(|n| range.contains(n));
    let (least, most) = (range.start(), range.end());
    number.ok_or_else(|| format!("{name} {value}: not a number from {least} to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_end_where_the_command_begins() {
        let args = [
            "--cpus",
            "4",
            "--two-hosts",
            "--seconds",
            "9",
            "--memory",
            "512",
            "--",
            "ls",
            "--cpus",
            "--",
        ];
        let options = Options {
            seconds: 9,
            cpus: 4,
            memory: 512,
            two_hosts: true,
        };
        assert_eq!(
            parse(&args),
            Ok((options, ["ls", "--cpus", "--"].as_slice()))
        );
        let plain = (Options::default(), ["ls"].as_slice());
        assert_eq!(parse(&["--", "ls"]), Ok(plain));
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        for (args, why) in [
            (&[][..], "no command"),
            (&["--cpus", "1"], "no command"),
            (&["--"], "no command"),
            (&["ls"], "ls: the command comes after `--`"),
            (&["--cpu", "1", "--", "ls"], "--cpu: no such option"),
            (&["--cpus"], "--cpus needs a number"),
            (
                &["--cpus", "0", "--", "ls"],
                "--cpus 0: not a number from 1 to 64",
            ),
            (
                &["--cpus", "--", "ls"],
                "--cpus --: not a number from 1 to 64",
            ),
            (
                &["--memory", "64", "--", "ls"],
                "--memory 64: not a number from 512 to 1048576",
            ),
            (
                &["--seconds", "-1", "--", "ls"],
                "--seconds -1: not a number from 1 to 86400",
            ),
        ] {
            assert_eq!(parse(args), Err(why.to_owned()), "{args:?}");
        }
    }
}
