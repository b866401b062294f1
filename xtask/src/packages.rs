//! Debian packages that a step needs.

use std::path::{Path, PathBuf};

use crate::command::quiet;

/// What the virtual machine needs to be made, to start and to be set up, and what its tests run, by
/// package.
const GUEST_PROGRAMS: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("setpriv", "util-linux"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("/sbin/depmod", "kmod"),
    ("rdma", "iproute2"),
    ("ibv_rc_pingpong", "ibverbs-utils"),
    ("ib_write_bw", "perftest"),
];

/// Makes sure that `program` can be started, installing `package` with apt-get if it cannot and we
/// are root.
///
/// # Errors
///
/// Why the program is not there, for people to read.
pub(crate) fn need(program: &str, package: &str) -> Result<(), String> {
    install(program, package, || {
        quiet(program, &["--version"]).is_some()
    })
}

/// Makes sure that `what`, which `package` has, is `there`.
fn install(what: &str, package: &str, there: impl Fn() -> bool) -> Result<(), String> {
    if there() {
        return Ok(());
    }
    if !is_root() {
        return Err(format!("{what} is missing: apt-get install {package}"));
    }
    println!("installing {package}, for {what} is missing");
    let install = ["install", "-y", "--no-install-recommends", package];
    let installed = quiet("apt-get", &install) == Some(true)
        || (quiet("apt-get", &["update"]) == Some(true)
            && quiet("apt-get", &install) == Some(true));
    if installed && there() {
        Ok(())
    } else {
        Err(format!(
            "{what} is missing and apt-get install {package} failed"
        ))
    }
}

/// Makes sure that a C compiler, bindgen's clang and the headers of rdma-core are there.
///
/// # Errors
///
/// Why they are not, for people to read.
pub(crate) fn rdma_headers() -> Result<(), String> {
    need("cc", "gcc")?;
    need("clang", "clang")?;
    need("pkg-config", "pkg-config")?;
    for (library, package) in [
        ("libibverbs", "libibverbs-dev"),
        ("librdmacm", "librdmacm-dev"),
    ] {
        let headers = format!("{library}'s headers");
        install(&headers, package, || {
            quiet("pkg-config", &["--exists", library]) == Some(true)
        })?;
    }
    // Where bindgen looks for it, beside the linker's folders.
    let find = "ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* | grep -v cpp";
    install("libclang", "libclang-dev", || {
        quiet("sh", &["-c", find]) == Some(true)
    })
}

/// The folder of the oldest libclang that is installed: the bindgen of rdma-sys panics with the newest, which the
/// GPU's compiler brings.
pub(crate) fn oldest_libclang() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib")
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let version: u32 = name.to_str()?.strip_prefix("llvm-")?.parse().ok()?;
            let folder = entry.path().join("lib");
            let has = |file: std::fs::DirEntry| {
                let name = file.file_name();
                name.to_str()
                    .is_some_and(|n| n.starts_with("libclang.so") || n.starts_with("libclang-1"))
            };
            let found = std::fs::read_dir(&folder).ok()?.flatten().any(has);
            found.then_some((version, folder))
        });
    versions.min().map(|(_, folder)| folder)
}

/// Makes sure that a real libamdhip64 is there, which tests load to see what it says without a GPU.
///
/// # Errors
///
/// Why it is not, for people to read.
pub(crate) fn hip() -> Result<(), String> {
    let find = "ls /usr/lib/*/libamdhip64.so.[567] /opt/rocm/lib/libamdhip64.so.[567] 2>/dev/null | grep -q .";
    install("libamdhip64", "libamdhip64-5", || {
        quiet("sh", &["-c", find]) == Some(true)
    })
}

/// Makes sure that the headers of HIP are there.
///
/// # Errors
///
/// Why they are not, for people to read.
pub(crate) fn hip_headers() -> Result<(), String> {
    install("hip_runtime_api.h", "libamdhip64-dev", || {
        Path::new("/usr/include/hip/hip_runtime_api.h").exists()
    })
}

/// Makes sure that what the virtual machine starts with and what runs inside it are there: the guest
/// has this machine's programs.
///
/// # Errors
///
/// Why they are not, for people to read.
pub(crate) fn rdma_guest() -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        return Err("the virtual machine is for x86-64".into());
    }
    if quiet("apt-get", &["--version"]).is_none() {
        return Err("the virtual machine needs Debian's packages, and there is no apt-get".into());
    }
    for (program, package) in GUEST_PROGRAMS {
        need(program, package)?;
    }
    // In the initrd there is no library.
    let fixed = "busybox true && ! ldd \"$(command -v busybox)\"";
    install("a busybox without libraries", "busybox-static", || {
        quiet("sh", &["-c", fixed]) == Some(true)
    })?;
    install("libibverbs' driver of rxe", "ibverbs-providers", || {
        Path::new("/etc/libibverbs.d/rxe.driver").exists()
    })
}

/// Makes sure that `cargo fuzz` is there, building it if it is not.
///
/// # Errors
///
/// Why it is not there, for people to read.
pub(crate) fn cargo_fuzz() -> Result<(), String> {
    let cargo = crate::command::cargo();
    let cargo = cargo.to_string_lossy();
    let there = || quiet(&cargo, &["fuzz", "--version"]) == Some(true);
    if there() {
        return Ok(());
    }
    println!("installing cargo-fuzz");
    let installed = quiet(&cargo, &["install", "--locked", "cargo-fuzz"]) == Some(true);
    if installed && there() {
        Ok(())
    } else {
        Err("cargo-fuzz is missing: cargo install --locked cargo-fuzz".into())
    }
}

/// Whether network namespaces can be made here.
///
/// # Errors
///
/// Why not, for people to read.
pub(crate) fn namespaces() -> Result<(), String> {
    let name = format!("kvx-probe-{}", std::process::id());
    let made = quiet("ip", &["netns", "add", &name]) == Some(true);
    // What was half made goes too.
    let gone = quiet("ip", &["netns", "del", &name]) == Some(true);
    if made && gone {
        Ok(())
    } else {
        Err("no network namespaces can be made: that needs root and CAP_SYS_ADMIN".into())
    }
}

fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .and_then(|ids| ids.split_ascii_whitespace().nth(1))
        == Some("0")
}
