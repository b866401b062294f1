//! A program that starts where libibverbs is not there, or is not what it says, and tells which.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `cargo test` builds the examples next to the tests.
fn example() -> PathBuf {
    let test = std::env::current_exe().expect("exe");
    let profile = test.parent().and_then(Path::parent);
    let folder = profile.expect("target/PROFILE/deps").join("examples");
    folder.join("rdma_devices")
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("kvxfer-rdma-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the example where the loader looks into `folder` first.
fn run(folder: &Folder) -> Output {
    Command::new(example())
        .env("LD_LIBRARY_PATH", &folder.0)
        .output()
        .expect("the example starts")
}

fn told(output: &Output) -> String {
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(4), "{words}");
    words
}

#[test]
fn a_library_without_the_symbols_is_named_with_the_first_that_is_missing() {
    let folder = Folder::new("empty");
    let (source, library) = (folder.0.join("a.c"), folder.0.join("libibverbs.so.1"));
    std::fs::write(&source, "int nothing;\n").expect("source");
    let cc = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    assert!(cc.expect("cc").success());
    let words = told(&run(&folder));
    assert!(words.contains("ibv_get_device_list@IBVERBS_1.1"), "{words}");
    assert!(words.contains(&library.display().to_string()), "{words}");
}

#[test]
fn a_library_that_cannot_be_loaded_is_told_in_the_loaders_words() {
    let folder = Folder::new("text");
    let library = folder.0.join("libibverbs.so.1");
    std::fs::write(&library, [b'x'; 4096]).expect("library");
    let words = told(&run(&folder));
    assert!(words.contains("invalid ELF header"), "{words}");
    assert!(words.contains("install rdma-core"), "{words}");
}
