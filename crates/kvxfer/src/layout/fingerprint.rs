//! A format's fingerprint.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{GroupKind, KvFormat, Scaling, TensorRole};

/// SHA-256 over a format's [canonical bytes](KvFormat::canonical): the same on every platform and
/// in every version of this crate.
///
/// Equal fingerprints mean equal formats. Unequal ones say nothing about what differs, nor whether
/// it matters: compare the formats for that.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The version of the canonical encoding.
const VERSION: u32 = 2;

impl KvFormat {
    /// The format's fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(Sha256::digest(self.canonical()).into())
    }

    /// The format as bytes, one way and no other; what a fingerprint is made of. docs/layouts.md
    /// has the encoding, in the section "The canonical encoding".
    #[must_use]
    pub fn canonical(&self) -> Vec<u8> {
        let mut out = Encoder(Vec::new());
        out.format(self);
        out.0
    }
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn u8(&mut self, v: u8) {
        self.0.push(v);
    }

    fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    fn len(&mut self, len: usize) {
        // The limits of a format keep every list and name far below this.
        self.u32(u32::try_from(len).expect("a valid format has no list of 2^32 items"));
    }

    fn string(&mut self, s: &str) {
        self.len(s.len());
        self.0.extend_from_slice(s.as_bytes());
    }

    fn option<T>(&mut self, v: Option<T>, f: impl FnOnce(&mut Self, T)) {
        match v {
            None => self.u8(0),
            Some(v) => {
                self.u8(1);
                f(self, v);
            }
        }
    }

    fn format(&mut self, format: &KvFormat) {
        self.0.extend_from_slice(b"kvxfer.kv-format");
        self.u32(VERSION);
        let model = format.model();
        self.string(&model.model_type);
        self.option(model.id.as_deref(), Self::string);
        self.option(model.revision.as_deref(), Self::string);
        self.len(model.facts.len());
        for (key, value) in &model.facts {
            self.string(key);
            self.string(value);
        }
        self.len(format.groups().len());
        for group in format.groups() {
            self.string(&group.name);
            match group.kind {
                GroupKind::Full => self.u8(1),
                GroupKind::SlidingWindow { tokens } => {
                    self.u8(2);
                    self.u32(tokens);
                }
                GroupKind::StateSlots => self.u8(3),
            }
            self.u32(group.block_tokens);
            self.len(group.layers.len());
            for layer in &group.layers {
                self.u32(layer.layer);
                self.u8(u8::from(layer.draft));
                self.len(layer.tensors.len());
                for tensor in &layer.tensors {
                    self.tensor(tensor);
                }
            }
        }
    }

    fn tensor(&mut self, tensor: &super::TensorFormat) {
        self.string(&tensor.name);
        self.u8(role_code(tensor.role));
        self.u8(tensor.dtype.code());
        self.len(tensor.axes.len());
        for axis in &tensor.axes {
            self.u8(axis.kind.code());
            self.u64(axis.extent);
        }
        self.option(tensor.sharded, Self::u32);
        self.option(tensor.scaling.as_ref(), |out, scaling| match scaling {
            Scaling::Constant { axes, bits } => {
                out.u8(1);
                out.len(axes.len());
                axes.iter().for_each(|axis| out.u8(axis.code()));
                out.len(bits.len());
                bits.iter().for_each(|bits| out.u32(*bits));
            }
            Scaling::Tensor { name } => {
                out.u8(2);
                out.string(name);
            }
        });
    }
}

const fn role_code(role: TensorRole) -> u8 {
    match role {
        TensorRole::Key => 1,
        TensorRole::Value => 2,
        TensorRole::KeyValue => 3,
        TensorRole::Latent => 4,
        TensorRole::Rope => 5,
        TensorRole::Scale => 6,
        TensorRole::Index => 7,
        TensorRole::State => 8,
        TensorRole::Conv => 9,
        TensorRole::Opaque => 10,
    }
}
