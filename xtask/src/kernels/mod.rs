//! `cargo xtask kernels`: the device code of `kernels/`, built for every target into
//! `kernels/prebuilt/`, so that nobody else needs a device compiler; and the checks of what lies there.

mod disassembly;
mod listing;
mod manifest;
mod ptx;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use crate::packages;
use manifest::{Artefact, Manifest};

const CLANG: &str = "clang-22";
const STRIP: &str = "llvm-strip-22";
const OBJDUMP: &str = "llvm-objdump-22";

/// The programs, and the packages that have them.
const TOOLS: [(&str, &str); 4] = [
    (CLANG, "clang-22"),
    ("ld.lld-22", "lld-22"),
    (STRIP, "llvm-22"),
    (OBJDUMP, "llvm-22"),
];

/// Where the generated Rust is.
const RUST: &str = "crates/hipmem/src/kernels/prebuilt.rs";

/// What all targets are compiled with. No path and no time goes into the output.
const COMMON: [&str; 8] = [
    "-O3",
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-function",
    "-fno-exceptions",
    "-fno-ident",
];

/// What a target is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Amd,
    Ptx,
    Host,
}

/// What is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// What moves and checks blocks; on the host the posts too.
    Kvx,
    /// Posts by kernels.
    Post,
    /// All of the host's with faults that tests plant. No program has it.
    Planted,
}

impl Source {
    fn file(self) -> &'static str {
        match self {
            Self::Kvx => "kvx.hip",
            Self::Post => "post.hip",
            Self::Planted => "planted.hip",
        }
    }
}

/// Something that the kernels are built for.
#[derive(Debug)]
struct Target {
    name: &'static str,
    source: Source,
    kind: Kind,
    /// Lanes of a warp.
    warp: u32,
}

const fn target(source: Source, name: &'static str, kind: Kind, warp: u32) -> Target {
    Target {
        name,
        source,
        kind,
        warp,
    }
}

/// In the order of the manifest.
const TARGETS: [Target; 14] = [
    target(Source::Kvx, "gfx90a", Kind::Amd, 64),
    target(Source::Kvx, "gfx942", Kind::Amd, 64),
    target(Source::Kvx, "gfx950", Kind::Amd, 64),
    target(Source::Kvx, "gfx1100", Kind::Amd, 32),
    // The oldest capability of the GPUs that serve models today. The driver compiles it for later
    // ones, and nothing of theirs would make a copy faster.
    target(Source::Kvx, "sm_80", Kind::Ptx, 32),
    target(Source::Kvx, "x86_64", Kind::Host, 32),
    target(Source::Kvx, "aarch64", Kind::Host, 32),
    target(Source::Post, "gfx90a", Kind::Amd, 64),
    target(Source::Post, "gfx942", Kind::Amd, 64),
    target(Source::Post, "gfx950", Kind::Amd, 64),
    target(Source::Post, "gfx1100", Kind::Amd, 32),
    target(Source::Post, "sm_80", Kind::Ptx, 32),
    target(Source::Planted, "x86_64", Kind::Host, 32),
    target(Source::Planted, "aarch64", Kind::Host, 32),
];

impl Target {
    fn file(&self) -> String {
        let suffix = match self.kind {
            Kind::Amd => "hsaco",
            Kind::Ptx => "ptx",
            Kind::Host => "so",
        };
        let name = self.name;
        match self.source {
            Source::Kvx => format!("{name}.{suffix}"),
            Source::Post => format!("post-{name}.{suffix}"),
            Source::Planted => format!("planted-{name}.{suffix}"),
        }
    }

    /// The compiler's arguments, but for the input and the output.
    fn flags(&self) -> Vec<String> {
        let own: Vec<String> = match self.kind {
            Kind::Amd => vec![
                "-x".into(),
                "hip".into(),
                "--cuda-device-only".into(),
                "--no-gpu-bundle-output".into(),
                format!("--offload-arch={}", self.name),
                "-nogpuinc".into(),
                "-nogpulib".into(),
                "-fuse-cuid=none".into(),
                // ROCm 5.7 and later load it.
                "-mcode-object-version=5".into(),
            ],
            Kind::Ptx => vec![
                "-x".into(),
                "cuda".into(),
                "--cuda-device-only".into(),
                format!("--cuda-gpu-arch={}", self.name),
                // PTX 7.5: drivers of CUDA 11.5 and later take it.
                "--cuda-feature=+ptx75".into(),
                "-nocudainc".into(),
                "-nocudalib".into(),
                "-fuse-cuid=none".into(),
                "-S".into(),
            ],
            // Freestanding: the output needs no C library, and building it no headers. Kernels for
            // aarch64 may have pages of 64 KiB.
            Kind::Host => vec![
                "-x".into(),
                "c++".into(),
                format!("--target={}-unknown-linux-gnu", self.name),
                "-ffreestanding".into(),
                "-nostdlib".into(),
                "-nostdinc".into(),
                "-fPIC".into(),
                "-shared".into(),
                "-fvisibility=hidden".into(),
                "-fno-rtti".into(),
                "-fuse-ld=lld".into(),
                "-Wl,-s,--build-id=none,-z,defs,-z,max-page-size=65536".into(),
            ],
        };
        let common = COMMON.iter().map(|flag| (*flag).to_owned());
        own.into_iter().chain(common).collect()
    }
}

/// What a check found.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// What is wrong, one line each.
    pub(crate) problems: Vec<String>,
    /// Why something could not be looked at.
    pub(crate) skipped: Option<String>,
}

/// Runs the command with these arguments; `None` for arguments that it does not have.
pub(crate) fn by_hand(root: &Path, args: &[&str]) -> Option<anyhow::Result<bool>> {
    match args {
        [] => Some(build(root).map(|()| true)),
        ["--check"] => Some(check(root).map(|checked| {
            for problem in &checked.problems {
                eprintln!("{problem}");
            }
            if let Some(why) = &checked.skipped {
                println!("not looked at: {why}");
            }
            checked.problems.is_empty()
        })),
        _ => None,
    }
}

/// Builds everything anew.
fn build(root: &Path) -> anyhow::Result<()> {
    tools().map_err(anyhow::Error::msg)?;
    let folder = root.join("kernels/prebuilt");
    fs::create_dir_all(&folder)?;
    let mut artefacts = Vec::new();
    for target in &TARGETS {
        let out = folder.join(target.file());
        compile(root, target, &out)?;
        let bytes = fs::read(&out)?;
        artefacts.push(Artefact {
            target: target.name.to_owned(),
            source: target.source.file().to_owned(),
            file: target.file(),
            len: bytes.len() as u64,
            sha256: hex(&bytes),
            flags: target.flags(),
        });
    }
    let manifest = Manifest {
        sources_sha256: sources_sha256(root)?,
        compiler: compiler()?,
        artefacts,
    };
    fs::write(folder.join("manifest.json"), manifest.to_json()?)?;
    fs::write(root.join(RUST), manifest.to_rust(&TARGETS))?;
    let checked = check(root)?;
    if !checked.problems.is_empty() {
        bail!("what was built is wrong:\n{}", checked.problems.join("\n"));
    }
    for artefact in &manifest.artefacts {
        println!("{:>8} bytes  {}", artefact.len, artefact.file);
    }
    Ok(())
}

/// Looks at what lies in `kernels/prebuilt/`: whether it is of these sources, whether it is what a
/// compiler of the same version makes of them, and whether the instructions are those that must be
/// there.
///
/// # Errors
///
/// A file that cannot be read, or a tool that fails.
pub(crate) fn check(root: &Path) -> anyhow::Result<Checked> {
    let mut checked = Checked::default();
    let folder = root.join("kernels/prebuilt");
    let text = fs::read_to_string(folder.join("manifest.json"))
        .context("kernels/prebuilt/manifest.json: run cargo xtask kernels")?;
    let manifest = Manifest::from_json(&text)?;
    let problems = &mut checked.problems;
    if manifest.sources_sha256 != sources_sha256(root)? {
        problems
            .push("kernels/prebuilt is not of these sources: run cargo xtask kernels".to_owned());
    }
    if fs::read_to_string(root.join(RUST))? != manifest.to_rust(&TARGETS) {
        problems.push(format!("{RUST} is not what the manifest says"));
    }
    let files: Vec<_> = manifest.artefacts.iter().map(|a| a.file.clone()).collect();
    if !files
        .iter()
        .eq(TARGETS.iter().map(Target::file).collect::<Vec<_>>().iter())
    {
        problems.push(format!("kernels/prebuilt/manifest.json has {files:?}"));
        return Ok(checked);
    }
    for (target, artefact) in TARGETS.iter().zip(&manifest.artefacts) {
        let bytes = fs::read(folder.join(target.file()))?;
        if hex(&bytes) != artefact.sha256 || bytes.len() as u64 != artefact.len {
            problems.push(format!("{}: not the bytes of the manifest", target.file()));
        }
        if target.flags() != artefact.flags {
            problems.push(format!("{}: built with other flags", target.file()));
        }
        if target.kind == Kind::Ptx {
            let text = String::from_utf8_lossy(&bytes);
            let found = ptx::problems(target.source, target.name, &text);
            problems.extend(found.iter().map(|p| format!("{}: {p}", target.file())));
        }
    }
    if let Err(why) = tools() {
        checked.skipped = Some(format!("the disassembly and the bytes of a build: {why}"));
        return Ok(checked);
    }
    for target in TARGETS.iter().filter(|t| t.kind == Kind::Amd) {
        let listing = disassemble(target, &folder.join(target.file()))?;
        let found = disassembly::problems(target.source, target.name, &listing);
        problems.extend(found.iter().map(|p| format!("{}: {p}", target.file())));
    }
    let here = compiler()?;
    if here != manifest.compiler {
        println!(
            "built by {}; here is {here}: bytes are not compared",
            manifest.compiler
        );
        return Ok(checked);
    }
    let again = root.join("target/kernels");
    fs::create_dir_all(&again)?;
    for target in &TARGETS {
        let out = again.join(target.file());
        compile(root, target, &out)?;
        if fs::read(&out)? != fs::read(folder.join(target.file()))? {
            let file = target.file();
            problems.push(format!(
                "{file}: {here} makes other bytes; they are in target/kernels/{file}"
            ));
        }
    }
    Ok(checked)
}

/// Makes sure that the compiler and its tools are there.
fn tools() -> Result<(), String> {
    for (program, package) in TOOLS {
        packages::need(program, package)?;
    }
    Ok(())
}

fn compile(root: &Path, target: &Target, out: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(CLANG);
    // Inputs by their bare names: a path would show in the output.
    command.current_dir(root.join("kernels"));
    command.args(target.flags());
    command.args([target.source.file(), "-o"]).arg(out);
    output(&mut command)?;
    if target.kind == Kind::Amd {
        output(Command::new(STRIP).arg(out))?;
    }
    Ok(())
}

fn disassemble(target: &Target, file: &Path) -> anyhow::Result<String> {
    let mut command = Command::new(OBJDUMP);
    command.args(["-d", "--no-show-raw-insn"]);
    command.arg(format!("--mcpu={}", target.name)).arg(file);
    output(&mut command)
}

/// The compiler's first line about itself.
fn compiler() -> anyhow::Result<String> {
    let text = output(Command::new(CLANG).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Runs to the end; what it printed.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = format!("{command:?}");
    let ended = command
        .output()
        .with_context(|| format!("starting {name}"))?;
    if !ended.status.success() {
        let words = String::from_utf8_lossy(&ended.stderr);
        bail!("{name}: {}\n{words}", ended.status);
    }
    Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
}

/// The sources, in order.
fn sources(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(root.join("kernels"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "h" || e == "hip") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(sources)
}

/// SHA-256 over each source's name, length and bytes.
fn sources_sha256(root: &Path) -> anyhow::Result<String> {
    let mut all = Vec::new();
    for path in sources(root)? {
        let bytes = fs::read(&path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        all.extend_from_slice(format!("{name}\n{}\n", bytes.len()).as_bytes());
        all.extend_from_slice(&bytes);
    }
    Ok(hex(&all))
}

/// SHA-256 in hex.
fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
