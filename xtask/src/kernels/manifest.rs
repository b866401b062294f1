//! What lies in `kernels/prebuilt/`, what it was made of and by whom; and the Rust that embeds it.

use std::fmt::Write;

use anyhow::Context;
use serde_json::{Value, json};

use super::{Kind, Source, Target};

/// The manifest's first field.
const SCHEMA: &str = "kvxfer.kernels/1";

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) sources_sha256: String,
    /// The compiler's first line about itself.
    pub(super) compiler: String,
    pub(super) artefacts: Vec<Artefact>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Artefact {
    pub(super) target: String,
    /// The file that was compiled.
    pub(super) source: String,
    pub(super) file: String,
    pub(super) len: u64,
    pub(super) sha256: String,
    pub(super) flags: Vec<String>,
}

impl Manifest {
    pub(super) fn to_json(&self) -> anyhow::Result<String> {
        let artefacts = self.artefacts.iter().map(|a| {
            json!({
                "target": a.target,
                "source": a.source,
                "file": a.file,
                "len": a.len,
                "sha256": a.sha256,
                "flags": a.flags.join(" "),
            })
        });
        let value = json!({
            "schema": SCHEMA,
            "sources_sha256": self.sources_sha256,
            "compiler": self.compiler,
            "artefacts": artefacts.collect::<Vec<_>>(),
        });
        Ok(serde_json::to_string_pretty(&value)? + "\n")
    }

    pub(super) fn from_json(text: &str) -> anyhow::Result<Self> {
        let value: Value = serde_json::from_str(text).context("the kernels' manifest")?;
        if string(&value, "schema")? != SCHEMA {
            anyhow::bail!("the kernels' manifest is not {SCHEMA}");
        }
        let artefacts = value.get("artefacts").and_then(Value::as_array);
        let artefacts = artefacts.context("the kernels' manifest has no artefacts")?;
        let artefacts = artefacts.iter().map(|a| {
            Ok(Artefact {
                target: string(a, "target")?,
                source: string(a, "source")?,
                file: string(a, "file")?,
                len: a.get("len").and_then(Value::as_u64).context("no len")?,
                sha256: string(a, "sha256")?,
                flags: string(a, "flags")?.split(' ').map(str::to_owned).collect(),
            })
        });
        Ok(Self {
            sources_sha256: string(&value, "sources_sha256")?,
            compiler: string(&value, "compiler")?,
            artefacts: artefacts.collect::<anyhow::Result<_>>()?,
        })
    }

    /// The Rust that embeds the artefacts, as rustfmt leaves it.
    pub(super) fn to_rust(&self, targets: &[Target]) -> String {
        let mut text = format!(
            "//! Made by `cargo xtask kernels`; not for editing.\n\n\
             use super::{{Format, Image, Provenance}};\n\n\
             pub(super) const PROVENANCE: Provenance = Provenance {{\n\
             \x20   sources_sha256: \"{}\",\n\
             \x20   compiler: \"{}\",\n\
             }};\n",
            self.sources_sha256, self.compiler
        );
        for (name, source) in [("IMAGES", Source::Kvx), ("POST_IMAGES", Source::Post)] {
            let all = targets.iter().zip(&self.artefacts);
            Self::images(&mut text, name, all.filter(|(t, _)| t.source == source));
        }
        text
    }

    /// One table of images.
    fn images<'a>(
        text: &mut String,
        name: &str,
        of: impl Iterator<Item = (&'a Target, &'a Artefact)>,
    ) {
        // Writing to a string does not fail.
        let _ = write!(text, "\npub(super) const {name}: &[Image] = &[\n");
        for (target, artefact) in of {
            // The crate has a link to kernels/prebuilt, so that its package has the files.
            let path = format!("../../prebuilt/{}", artefact.file);
            let (format, bytes) = match target.kind {
                Kind::Amd => ("CodeObject", format!("include_bytes!(\"{path}\")")),
                Kind::Ptx => (
                    "Ptx",
                    format!("concat!(include_str!(\"{path}\"), \"\\0\").as_bytes()"),
                ),
                Kind::Host => ("Host", format!("include_bytes!(\"{path}\")")),
            };
            let _ = write!(
                text,
                "    Image {{\n\
                 \x20       target: \"{}\",\n\
                 \x20       format: Format::{format},\n\
                 \x20       bytes: {bytes},\n\
                 \x20       sha256: \"{}\",\n\
                 \x20       warp: {},\n\
                 \x20   }},\n",
                artefact.target, artefact.sha256, target.warp
            );
        }
        text.push_str("];\n");
    }
}

fn string(value: &Value, key: &str) -> anyhow::Result<String> {
    let found = value.get(key).and_then(Value::as_str);
    let found = found.with_context(|| format!("the kernels' manifest has no {key}"))?;
    Ok(found.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Artefact, Manifest};

    #[test]
    fn a_manifest_survives_its_file() {
        let manifest = Manifest {
            sources_sha256: "ab".into(),
            compiler: "clang 1".into(),
            artefacts: vec![Artefact {
                target: "gfx942".into(),
                source: "kvx.hip".into(),
                file: "gfx942.hsaco".into(),
                len: 7,
                sha256: "cd".into(),
                flags: vec!["-O3".into(), "-x".into()],
            }],
        };
        let text = manifest.to_json().expect("it is JSON");
        assert_eq!(Manifest::from_json(&text).expect("it is ours"), manifest);
        assert!(Manifest::from_json(&text.replace("kernels/1", "kernels/2")).is_err());
        assert!(Manifest::from_json(&text.replace("\"len\"", "\"length\"")).is_err());
    }
}
