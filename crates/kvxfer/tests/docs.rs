//! Keeps the documents in step with the code. `KVXFER_BLESS=1 cargo test -p kvxfer --test docs`
//! writes the parts that are made from it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    root.expect("crates/kvxfer is two folders down").to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What stands between two lines of a text, and where.
fn between<'a>(text: &'a str, begin: &str, end: &str) -> &'a str {
    let (_, rest) = text
        .split_once(begin)
        .unwrap_or_else(|| panic!("no {begin:?}"));
    let (part, _) = rest.split_once(end).unwrap_or_else(|| panic!("no {end:?}"));
    part
}

fn keep(page: &str, begin: &str, end: &str, wanted: &str) {
    let path = root().join("docs").join(page);
    let text = read(&path);
    let stands = between(&text, begin, end);
    if stands == wanted {
        return;
    }
    assert!(
        std::env::var_os("KVXFER_BLESS").is_some(),
        "docs/{page} is out of step after {begin:?}; run with KVXFER_BLESS=1 to write it"
    );
    let old = format!("{begin}{stands}{end}");
    let new = format!("{begin}{wanted}{end}");
    fs::write(&path, text.replacen(&old, &new, 1)).expect("the page can be written");
}

#[test]
fn configuration_lists_every_setting() {
    keep(
        "configuration.md",
        "<!-- reference: written by tests/docs.rs -->\n",
        "<!-- end of reference -->",
        &format!("\n{}\n", kvxfer::config::reference()),
    );
}

#[test]
fn waiting_shows_code_that_runs() {
    let example = root().join("crates/kvxfer/examples/tokio_waiting.rs");
    let example = read(&example);
    for part in ["a", "b", "c"] {
        let code = between(
            &example,
            &format!("// docs/waiting.md: ({part})\n"),
            &format!("// end of ({part})\n"),
        );
        keep(
            "waiting.md",
            &format!("<!-- tokio_waiting.rs: {part} -->\n"),
            &format!("<!-- end of {part} -->"),
            &format!("```rust\n{code}```\n"),
        );
    }
}

/// Everything in backquotes, code blocks aside.
fn quoted(text: &str) -> BTreeSet<&str> {
    let mut code = false;
    let mut quoted = BTreeSet::new();
    for line in text.lines() {
        if line.starts_with("```") {
            code = !code;
        } else if !code {
            quoted.extend(line.split('`').skip(1).step_by(2));
        }
    }
    quoted
}

#[test]
fn architecture_names_files_that_exist_and_every_part() {
    let root = root();
    let text = read(&root.join("docs/architecture.md"));
    let files: Vec<&str> = quoted(&text)
        .into_iter()
        .filter(|name| name.starts_with("crates/"))
        .collect();
    for file in &files {
        assert!(root.join(file).exists(), "docs/architecture.md: no {file}");
    }
    // Private helpers and crate roots are nobody's layer.
    let small = ["lib.rs", "error.rs", "time.rs", "recent.rs", "block_set.rs"];
    let parts = fs::read_dir(root.join("crates/kvxfer/src")).expect("the sources");
    for part in parts {
        let name = part.expect("an entry").file_name();
        let name = name.to_str().expect("a plain name");
        let prefix = format!("crates/kvxfer/src/{name}");
        assert!(
            small.contains(&name) || files.iter().any(|file| file.starts_with(&prefix)),
            "docs/architecture.md says nothing of {prefix}"
        );
    }
}
