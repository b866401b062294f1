//! The guest's kernel, its modules and its initrd: made once, of Debian's kernel package.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

use super::bzimage;
use super::cpio::Archive;

/// The package whose only dependency is the newest kernel. Debian's cloud kernel has neither rxe
/// nor 9p.
const KERNEL: &str = "linux-image-amd64";

/// The modules that the guest begins with: those that bring it to the host's files, and those that it
/// always needs, for from there they come slowly. All others it loads from there.
const EARLY: [&str; 8] = [
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "veth",
    "rdma_rxe",
    "rdma_ucm",
    "sch_netem",
];

/// What the initrd mounts things on.
const FOLDERS: [&str; 9] = [
    "bin", "modules", "dev", "proc", "sys", "host", "changes", "root", "job",
];

/// Says, in an image's folder, that it is whole.
const WHOLE: &str = "whole";

pub(super) struct Image {
    folder: PathBuf,
    version: String,
}

impl Image {
    pub(super) fn kernel(&self) -> PathBuf {
        self.folder.join("kernel")
    }

    /// Without `/init`.
    pub(super) fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }

    /// Holds a folder named as the version.
    pub(super) fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules")
    }

    /// The image in `cache`, where one is; or else makes one.
    ///
    /// # Errors
    ///
    /// A package that cannot be fetched, or is not as expected.
    pub(super) fn find_or_make(cache: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
        // Of two runs at once, one makes it and the other waits.
        let lock = File::create(cache.join("lock")).context("the lock of the kernel's folder")?;
        lock.lock().context("the lock of the kernel's folder")?;
        for entry in fs::read_dir(cache)?.flatten() {
            let image = Self {
                folder: entry.path(),
                version: entry.file_name().to_string_lossy().into_owned(),
            };
            if image.is_whole() {
                return Ok(image);
            }
        }
        let making = cache.join("making");
        remove(&making)?;
        fs::create_dir(&making)?;
        let mut image = Self {
            folder: making,
            version: newest_kernel()?,
        };
        println!("vm: making the image of {}, once", image.version);
        image.make()?;
        let folder = cache.join(&image.version);
        remove(&folder)?;
        fs::rename(&image.folder, &folder)
            .with_context(|| format!("naming {}", folder.display()))?;
        image.folder = folder;
        Ok(image)
    }

    fn make(&self) -> anyhow::Result<()> {
        let package = download(&self.version, &self.folder)?;
        run(Command::new("dpkg-deb")
            .arg("-x")
            .arg(&package)
            .arg(&self.folder))?;
        fs::remove_file(&package)?;
        run(Command::new("/sbin/depmod")
            .arg("-b")
            .arg(&self.folder)
            .arg(&self.version))?;
        self.make_kernel()?;
        fs::write(self.initrd(), self.early()?)?;
        fs::write(self.folder.join(WHOLE), self.sizes()?)?;
        Ok(())
    }

    fn make_kernel(&self) -> anyhow::Result<()> {
        let vmlinuz = self.folder.join(format!("boot/vmlinuz-{}", self.version));
        let image = fs::read(&vmlinuz).with_context(|| format!("reading {}", vmlinuz.display()))?;
        let Some(payload) = bzimage::payload(&image) else {
            fs::copy(&vmlinuz, self.kernel())?;
            return Ok(());
        };
        let packed = self.folder.join("kernel.xz");
        fs::write(&packed, payload.xz)?;
        run(Command::new("xz")
            .arg("-dc")
            .stdin(File::open(&packed)?)
            .stdout(File::create(self.kernel())?))?;
        fs::remove_file(&packed)?;
        let size = fs::metadata(self.kernel())?.len();
        ensure!(
            size == u64::from(payload.size),
            "the kernel has {size} bytes when unpacked, not {}",
            payload.size
        );
        Ok(())
    }

    /// An archive of what the guest begins with.
    fn early(&self) -> anyhow::Result<Vec<u8>> {
        let mut archive = Archive::default();
        for name in FOLDERS {
            archive.folder(name);
        }
        let busybox = find_busybox()?;
        archive.program("bin/busybox", &fs::read(busybox)?);
        let mut all = Vec::new();
        for name in EARLY {
            let wanted = Command::new("/sbin/modprobe")
                .arg("-d")
                .arg(&self.folder)
                .args(["-S", &self.version, "--show-depends", name])
                .output()
                .context("starting modprobe")?;
            ensure!(
                wanted.status.success(),
                "{name} of {}: {}",
                self.version,
                String::from_utf8_lossy(&wanted.stderr).trim_end()
            );
            for path in insmods(&String::from_utf8_lossy(&wanted.stdout)) {
                if !all.contains(&path) {
                    all.push(path);
                }
            }
        }
        for (i, path) in all.iter().enumerate() {
            let module = fs::read(path).with_context(|| format!("reading {path}"))?;
            let name = path.rsplit('/').next().unwrap_or(path);
            // A shell's `*` gives them in this order.
            archive.program(&format!("modules/{i:02}-{name}"), &module);
        }
        Ok(archive.finish())
    }

    fn is_whole(&self) -> bool {
        let said = fs::read_to_string(self.folder.join(WHOLE));
        said.is_ok_and(|said| self.sizes().is_ok_and(|sizes| sizes == said))
    }

    /// What the image is made of, then the pieces and their sizes, one a line.
    fn sizes(&self) -> anyhow::Result<String> {
        let index = self.modules().join(&self.version).join("modules.dep.bin");
        let mut sizes = format!("{}\n", EARLY.join(" "));
        for path in [self.kernel(), self.initrd(), index] {
            let size = fs::metadata(&path)
                .with_context(|| path.display().to_string())?
                .len();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            sizes += &format!("{name} {size}\n");
        }
        Ok(sizes)
    }
}

/// The version of the kernel that `KERNEL` stands for.
fn newest_kernel() -> anyhow::Result<String> {
    let mut told = depends()?;
    if dependency(&told).is_none() {
        // A fresh machine has no lists of packages yet; only root can fetch them.
        let _ = Command::new("apt-get").args(["update", "-q"]).output();
        told = depends()?;
    }
    let version = dependency(&told);
    version.with_context(|| format!("apt-cache knows no {KERNEL}: apt-get update"))
}

fn depends() -> anyhow::Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", KERNEL])
        .output()
        .context("starting apt-cache")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The kernel's version in what `apt-cache depends` says.
fn dependency(told: &str) -> Option<String> {
    told.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
        // It names a folder.
        .filter(|version| !version.is_empty() && !version.contains('/'))
        .map(str::to_owned)
}

/// Fetches the kernel's package into `folder`.
fn download(version: &str, folder: &Path) -> anyhow::Result<PathBuf> {
    let package = format!("linux-image-{version}");
    let mut command = Command::new("apt-get");
    command
        .args(["download", "-q", &package])
        .current_dir(folder)
        .stdin(Stdio::null());
    let mut output = command.output().context("starting apt-get")?;
    if !output.status.success() {
        // The lists may be of a time before the last security update.
        let _ = Command::new("apt-get").args(["update", "-q"]).output();
        output = command.output().context("starting apt-get")?;
    }
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("apt-get download {package}: {}", why.trim_end());
    }
    let mut found = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    let found = found.find(|path| path.extension().is_some_and(|e| e == "deb"));
    found.with_context(|| format!("apt-get download {package} left no package"))
}

/// The files that `modprobe --show-depends` would load, in order.
fn insmods(told: &str) -> Vec<String> {
    told.lines()
        .filter_map(|line| line.strip_prefix("insmod "))
        .map(|path| path.trim_end().to_owned())
        .collect()
}

fn find_busybox() -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|folder| folder.join("busybox"));
    let found = found.find(|file| file.is_file());
    found.context("busybox is not in the path")
}

/// Runs to the end; what it says is told only if it fails.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let name = format!("{command:?}");
    let output = command
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .with_context(|| format!("starting {name}"))?;
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name}: {}", why.trim_end());
    Ok(())
}

/// Removes a folder that may not be there.
pub(super) fn remove(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_what_the_package_depends_on() {
        let told = "linux-image-amd64\n  Depends: linux-image-6.1.0-48-amd64\n";
        assert_eq!(dependency(told).as_deref(), Some("6.1.0-48-amd64"));
        for told in [
            "",
            "linux-image-amd64\n",
            "  Depends: libc6\n",
            "  Depends: linux-image-\n",
            "  Depends: linux-image-../../x\n",
        ] {
            assert_eq!(dependency(told), None, "{told}");
        }
    }

    #[test]
    fn modules_come_in_the_order_of_loading() {
        let told = "insmod /m/virtio.ko \nbuiltin netfs\ninsmod /m/9pnet.ko \n";
        assert_eq!(insmods(told), ["/m/virtio.ko", "/m/9pnet.ko"]);
    }

    #[test]
    fn an_image_is_whole_when_every_piece_has_the_size_it_had() {
        let name = format!("kvxfer-xtask-image-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        let image = Image {
            folder: folder.clone(),
            version: "1".into(),
        };
        let index = image.modules().join("1/modules.dep.bin");
        fs::create_dir_all(image.modules().join("1")).unwrap();
        for piece in [&image.kernel(), &image.initrd(), &index] {
            fs::write(piece, "abc").unwrap();
        }
        assert!(!image.is_whole(), "nobody said so");
        fs::write(folder.join(WHOLE), image.sizes().unwrap()).unwrap();
        assert!(image.is_whole());
        for piece in [&image.kernel(), &image.initrd(), &index] {
            fs::write(piece, "ab").unwrap();
            assert!(!image.is_whole(), "{} is short", piece.display());
            fs::remove_file(piece).unwrap();
            assert!(!image.is_whole(), "{} is away", piece.display());
            fs::write(piece, "abc").unwrap();
        }
        assert!(image.is_whole());
        fs::remove_dir_all(&folder).unwrap();
    }
}
