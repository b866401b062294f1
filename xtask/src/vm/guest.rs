//! A run of the guest: QEMU, the folder that it shares with us, and its end.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::cpio::Archive;
use super::image::{Image, remove};
use super::options::Options;

/// How often we look for more output and for the end.
const LOOK: Duration = Duration::from_millis(20);
/// A guest that KVM runs is up long before.
const KVM_BOOTS: Duration = Duration::from_secs(30);

/// Of the console, lines that are shown when the guest has not come to a proper end.
const CONSOLE: usize = 40;

/// Names the RDMA devices for the tests, in pairs.
const DEVICES: &str = "KVXFER_TEST_RDMA";

/// What is to be done in a guest.
pub(crate) struct Task<'a> {
    pub(crate) options: Options,
    /// Where the command runs: a folder of the host.
    pub(crate) folder: &'a Path,
    /// The program and its arguments.
    pub(crate) command: &'a [OsString],
    /// Beside what [`passed_on`] takes from our own.
    pub(crate) environment: &'a [(&'a str, OsString)],
}

/// How a guest ended.
pub(crate) enum End {
    /// By itself: the command's exit code, 128 and more for a signal.
    Exit(u8),
    /// The limit was reached.
    TimedOut,
    /// The machine went away before the command ended.
    Died,
}

pub(crate) struct Ended {
    pub(crate) end: End,
    /// All that the command said, in no order between the two outputs.
    pub(crate) lines: Vec<String>,
    /// From the start of QEMU to the start of the command, where it came to that.
    pub(crate) up: Option<Duration>,
    /// The last lines of the console, where the end is none of the command's.
    pub(crate) console: String,
}

/// Boots, runs the command to its end and shows what it says as it comes.
///
/// # Errors
///
/// QEMU cannot be started or the folder for the run cannot be written.
pub(super) fn run(root: &Path, cache: &Path, image: &Image, task: &Task) -> anyhow::Result<Ended> {
    let job = Job::new(root, cache, image, task)?;
    let mut outputs = [
        Follow::new(&job.0.join("stdout"), Box::new(std::io::stdout()))?,
        Follow::new(&job.0.join("stderr"), Box::new(std::io::stderr()))?,
    ];
    let start = Instant::now();
    let limit = Duration::from_secs(task.options.seconds.into());
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let mut kvm = kvm.is_ok();
    let mut qemu = Qemu::start(&job, image, &task.options, kvm)?;
    let mut up = None;
    let end = loop {
        // In this order: what was there when it ended is still seen.
        let gone = qemu.is_gone()?;
        let code = fs::read_to_string(job.0.join("code"));
        for output in &mut outputs {
            output.more();
        }
        if up.is_none() && job.0.join("up").exists() {
            up = Some(start.elapsed());
        }
        if let Ok(code) = code {
            let code = code.trim().parse().context("the exit code of the guest")?;
            break End::Exit(code);
        }
        if kvm && up.is_none() && (gone || start.elapsed() >= KVM_BOOTS) {
            // Inside other machines it may be there and fail, or stand still.
            let console = job.console();
            let said = console.lines().next().unwrap_or("it does not start");
            eprintln!("vm: the guest is emulated, for KVM does not run it here: {said}");
            qemu.stop();
            kvm = false;
            qemu = Qemu::start(&job, image, &task.options, kvm)?;
            continue;
        }
        if gone {
            break End::Died;
        }
        if start.elapsed() >= limit {
            break End::TimedOut;
        }
        std::thread::sleep(LOOK);
    };
    let console = match end {
        End::Exit(_) => String::new(),
        End::TimedOut | End::Died => job.console(),
    };
    Ok(Ended {
        end,
        lines: outputs.into_iter().flat_map(Follow::lines).collect(),
        up,
        console,
    })
}

/// The folder that a run shares with its guest. It goes with the run.
struct Job(PathBuf);

impl Job {
    fn new(root: &Path, cache: &Path, image: &Image, task: &Task) -> anyhow::Result<Self> {
        sweep(cache);
        let job = Self(cache.join(format!("run-{}", std::process::id())));
        remove(&job.0)?;
        fs::create_dir(&job.0).with_context(|| format!("making {}", job.0.display()))?;
        for name in ["stdout", "stderr"] {
            File::create(job.0.join(name))?;
        }
        let scripts = root.join("tests/vm");
        let mut archive = Archive::default();
        archive.program("init", &fs::read(scripts.join("init.sh"))?);
        let mut initrd = fs::read(image.initrd()).context("reading the initrd")?;
        initrd.extend(archive.finish());
        fs::write(job.initrd(), initrd)?;
        fs::write(
            job.0.join("environment"),
            environment(&scripts, image, task),
        )?;
        fs::write(job.0.join("command"), command(task))?;
        Ok(job)
    }

    fn initrd(&self) -> PathBuf {
        self.0.join("initrd")
    }

    /// What QEMU and the guest's kernel said last.
    fn console(&self) -> String {
        let mut text = fs::read(self.0.join("qemu")).unwrap_or_default();
        text.extend(fs::read(self.0.join("console")).unwrap_or_default());
        let text = String::from_utf8_lossy(&text).replace('\r', "");
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE)..].join("\n")
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes the folders of runs that were killed.
fn sweep(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("run-"));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// QEMU, which ends with us in any case.
struct Qemu(Child);

impl Qemu {
    fn start(job: &Job, image: &Image, options: &Options, kvm: bool) -> anyhow::Result<Self> {
        let said = File::create(job.0.join("qemu"))?;
        // setpriv: a killed xtask leaves no machine behind.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        let accel = if kvm { "kvm" } else { "tcg,thread=multi" };
        command.args(["-accel", accel]);
        command.args(["-cpu", "max"]);
        command.args(["-smp", &options.cpus.to_string()]);
        command.args(["-m", &format!("{}M", options.memory)]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none"]);
        command.arg("-kernel").arg(image.kernel());
        command.arg("-initrd").arg(job.initrd());
        command.args([
            "-append",
            "console=ttyS0 quiet loglevel=4 nokaslr mitigations=off oops=panic panic=-1",
        ]);
        command
            .arg("-serial")
            .arg(option("file:", &job.0.join("console"), ""));
        // The host's root may have other file systems mounted on it.
        let host = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap";
        command.args(["-virtfs", host]);
        let shared = ",mount_tag=job,security_model=none";
        command
            .arg("-virtfs")
            .arg(option("local,path=", &job.0, shared));
        let child = command
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said)
            .spawn()
            .context("starting setpriv qemu-system-x86_64")?;
        Ok(Self(child))
    }

    fn stop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    fn is_gone(&mut self) -> anyhow::Result<bool> {
        let status = self.0.try_wait().context("waiting for QEMU")?;
        Ok(status.is_some())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A path inside an option of QEMU, where a comma would end it.
fn option(before: &str, path: &Path, after: &str) -> OsString {
    let mut option = before.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        option.push(byte);
        if byte == b',' {
            option.push(byte);
        }
    }
    option.extend(after.as_bytes());
    OsString::from_vec(option)
}

/// The environment of all that runs in the guest, in the words of a shell.
fn environment(scripts: &Path, image: &Image, task: &Task) -> Vec<u8> {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    let mut all = passed_on();
    all.extend([
        ("HOME".into(), "/root".into()),
        ("PATH".into(), path),
        ("KVXFER_VM".into(), scripts.into()),
        ("MODULES".into(), image.modules().into_os_string()),
        (
            "TWO_HOSTS".into(),
            if task.options.two_hosts { "1" } else { "" }.into(),
        ),
    ]);
    if std::env::var_os(DEVICES).is_none() {
        let devices = if task.options.two_hosts {
            "rxe0,ra:rb"
        } else {
            "rxe0"
        };
        all.push((DEVICES.into(), devices.into()));
    }
    let more = task.environment.iter();
    all.extend(more.map(|(name, value)| (OsString::from(name), value.clone())));
    let mut script = Vec::new();
    for (name, value) in all {
        script.extend(b"export ");
        script.extend(name.as_bytes());
        script.push(b'=');
        script.extend(quoted(&value));
        script.push(b'\n');
    }
    script
}

/// Of our environment, what is for the tests and for us.
fn passed_on() -> Vec<(OsString, OsString)> {
    let ours = |name: &OsString| {
        let name = name.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        (name.starts_with("KVXFER_") || name.starts_with("RUST_")) && name.chars().all(plain)
    };
    std::env::vars_os().filter(|(name, _)| ours(name)).collect()
}

/// The script that becomes the command.
fn command(task: &Task) -> Vec<u8> {
    let mut script = b"cd ".to_vec();
    script.extend(quoted(task.folder.as_os_str()));
    script.extend(b" || exit 125\nexec");
    for word in task.command {
        script.push(b' ');
        script.extend(quoted(word));
    }
    script.push(b'\n');
    script
}

/// As one word of a shell.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            _ => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// A file that grows: what comes is shown, and kept for counting.
struct Follow {
    file: File,
    to: Box<dyn Write>,
    all: Vec<u8>,
}

impl Follow {
    fn new(path: &Path, to: Box<dyn Write>) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let all = Vec::new();
        Ok(Self { file, to, all })
    }

    fn more(&mut self) {
        let seen = self.all.len();
        // What could not be read now is read the next time.
        let _ = self.file.read_to_end(&mut self.all);
        if let Some(new) = self.all.get(seen..).filter(|new| !new.is_empty()) {
            // A reader that has gone away must not end the tests.
            let _ = self.to.write_all(new).and_then(|()| self.to.flush());
        }
    }

    fn lines(self) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.all);
        text.lines().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_each_word_as_it_was() {
        let words = [
            "printf",
            "%s|",
            "it's",
            "",
            " a  b ",
            "$HOME `x` \\ \"*\"\n",
            "-n",
        ];
        let words: Vec<OsString> = words.map(OsString::from).to_vec();
        let task = Task {
            options: Options::default(),
            folder: Path::new("/"),
            command: &words,
            environment: &[],
        };
        let output = Command::new("sh")
            .arg("-c")
            .arg(OsString::from_vec(command(&task)))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said, "it's|| a  b |$HOME `x` \\ \"*\"\n|-n|");
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        let path = Path::new("/a,b/c");
        assert_eq!(option("file:", path, ",x=y"), "file:/a,,b/c,x=y");
    }
}
