//! A format's fingerprint.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{GroupKind, KvFormat, Scaling, TensorRole};

/// SHA-256 over a format's canonical encoding: the same on every platform and in every version of
/// this crate.
///
/// # The encoding, version 1
///
/// Integers are little endian. A *string* is its length in bytes as `u32`, then its bytes (UTF-8).
/// A *list* is its length as `u32`, then its items. An *option* is the byte 0, or the byte 1 and
/// the value. In this order:
///
/// | what | how |
/// |---|---|
/// | domain | the 16 bytes `kvxfer.kv-format`, then the version 1 as `u32` |
/// | model | string `model_type`; option of string `name`; option of string `revision`; list of facts by rising key, each two strings |
/// | groups | list of: string `name`; kind (below); `u32` block tokens; list of layers |
/// | kind | `u8`: 1 full; 2 sliding window, then `u32` tokens; 3 state slots |
/// | layer | `u32` index; `u8` draft (0 or 1); list of tensors |
/// | tensor | string `name`; `u8` role; `u8` dtype; list of axes; option of `u32` sharded axis; option of scaling |
/// | axis | `u8` kind; `u64` extent |
/// | scaling | `u8`: 1 per tensor, then `u32` bits; 2 tensor, then string name |
///
/// Codes count from 1 in the order of the enums' variants ([`TensorRole`], [`super::DType`],
/// [`super::AxisKind`]) and are never reused.
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

impl KvFormat {
    /// The format's fingerprint; see [`Fingerprint`] for what goes into it.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let mut out = Encoder(Sha256::new());
        out.format(self);
        Fingerprint(out.0.finalize().into())
    }
}

struct Encoder(Sha256);

impl Encoder {
    fn u8(&mut self, v: u8) {
        self.0.update([v]);
    }

    fn u32(&mut self, v: u32) {
        self.0.update(v.to_le_bytes());
    }

    fn u64(&mut self, v: u64) {
        self.0.update(v.to_le_bytes());
    }

    fn len(&mut self, len: usize) {
        // The limits of a format keep every list and name far below this.
        self.u32(u32::try_from(len).expect("a valid format has no list of 2^32 items"));
    }

    fn string(&mut self, s: &str) {
        self.len(s.len());
        self.0.update(s.as_bytes());
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
        self.0.update(b"kvxfer.kv-format");
        self.u32(1);
        let model = format.model();
        self.string(&model.model_type);
        self.option(model.name.as_deref(), Self::string);
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
            Scaling::PerTensor { bits } => {
                out.u8(1);
                out.u32(*bits);
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
