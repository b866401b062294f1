//! Libraries that pass for libibverbs, built by the compiler that links Rust programs.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::functions::Functions;
use super::library::Verbs;

/// A folder of its own that goes with the value.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kvxfer-verbs-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Builds `libibverbs.so.1` in `folder`: all required functions by their versions, but `without`.
/// They do nothing and say 11, but for `ibv_fork_init`, which says how often it was called before.
/// Those that rdma-core has twice are there twice; the old ones say 10.
pub(crate) fn build(folder: &Path, without: Option<&str>) -> PathBuf {
    let mut source = String::new();
    for (name, version) in Functions::REQUIRED {
        if without == Some(*name) {
            continue;
        }
        let mut function = |prefix: &str, mark: &str, says: &str| {
            let inner = format!("{prefix}_{name}");
            writeln!(source, "long {inner}(void) {{ {says} }}").unwrap();
            writeln!(source, "__asm__(\".symver {inner},{name}{mark}\");").unwrap();
        };
        let says = match *name {
            "ibv_fork_init" => "static long calls; return calls++;",
            _ => "return 11;",
        };
        // Two signs mark the default of a name.
        function("new", &format!("@@{version}"), says);
        if *version == "IBVERBS_1.1" {
            function("old", "@IBVERBS_1.0", "return 10;");
        }
    }
    let map =
        "IBVERBS_1.0 { global: ibv_*; local: *; };\nIBVERBS_1.1 { global: ibv_*; } IBVERBS_1.0;\n";
    compile(folder, &source, Some(map))
}

/// Builds `libibverbs.so.1` in `folder` from C, with the versions of a linker's map.
pub(crate) fn compile(folder: &Path, source: &str, map: Option<&str>) -> PathBuf {
    let (c, out) = (folder.join("fake.c"), folder.join("libibverbs.so.1"));
    std::fs::write(&c, source).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&out).arg(&c);
    if let Some(map) = map {
        let file = folder.join("fake.map");
        std::fs::write(&file, map).unwrap();
        cc.arg(format!("-Wl,--version-script={}", file.display()));
    }
    let output = cc.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cc: {words}");
    out
}

/// A whole fake, loaded. It stays loaded when its file is gone.
pub(crate) fn whole() -> Verbs {
    let folder = Folder::new();
    let path = build(folder.path(), None);
    match Verbs::open(&path) {
        Ok(verbs) => verbs,
        Err(e) => panic!("{e}"),
    }
}
