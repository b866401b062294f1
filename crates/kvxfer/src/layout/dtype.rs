//! Element types of cache tensors.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The type of a tensor's elements. Two types of the same size are still different bytes to a
/// reader: nothing converts between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DType {
    /// bfloat16.
    #[serde(rename = "bf16")]
    Bf16,
    /// IEEE half precision.
    #[serde(rename = "f16")]
    F16,
    /// IEEE single precision.
    #[serde(rename = "f32")]
    F32,
    /// 8-bit float, 4 exponent bits, finite (OCP).
    #[serde(rename = "fp8_e4m3")]
    F8E4m3,
    /// 8-bit float, 5 exponent bits (OCP).
    #[serde(rename = "fp8_e5m2")]
    F8E5m2,
    /// 8-bit float, 4 exponent bits, AMD's first encoding (no negative zero, bias 8).
    #[serde(rename = "fp8_e4m3fnuz")]
    F8E4m3Fnuz,
    /// 8-bit float, 5 exponent bits, AMD's first encoding (no negative zero, bias 16).
    #[serde(rename = "fp8_e5m2fnuz")]
    F8E5m2Fnuz,
    /// 8-bit power-of-two scale.
    #[serde(rename = "fp8_e8m0")]
    F8E8m0,
    /// Two 4-bit floats in one byte; an extent counts bytes.
    #[serde(rename = "fp4_e2m1x2")]
    F4E2m1x2,
    /// Signed 8-bit integer.
    #[serde(rename = "int8")]
    Int8,
    /// Unsigned 8-bit integer, or plain bytes.
    #[serde(rename = "uint8")]
    Uint8,
    /// Signed 32-bit integer.
    #[serde(rename = "int32")]
    Int32,
}

impl DType {
    /// Every type, in the order of their codes.
    pub const ALL: [Self; 12] = [
        Self::Bf16,
        Self::F16,
        Self::F32,
        Self::F8E4m3,
        Self::F8E5m2,
        Self::F8E4m3Fnuz,
        Self::F8E5m2Fnuz,
        Self::F8E8m0,
        Self::F4E2m1x2,
        Self::Int8,
        Self::Uint8,
        Self::Int32,
    ];

    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 | Self::Int32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F8E4m3
            | Self::F8E5m2
            | Self::F8E4m3Fnuz
            | Self::F8E5m2Fnuz
            | Self::F8E8m0
            | Self::F4E2m1x2
            | Self::Int8
            | Self::Uint8 => 1,
        }
    }

    /// The name used in files, flags and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F8E4m3 => "fp8_e4m3",
            Self::F8E5m2 => "fp8_e5m2",
            Self::F8E4m3Fnuz => "fp8_e4m3fnuz",
            Self::F8E5m2Fnuz => "fp8_e5m2fnuz",
            Self::F8E8m0 => "fp8_e8m0",
            Self::F4E2m1x2 => "fp4_e2m1x2",
            Self::Int8 => "int8",
            Self::Uint8 => "uint8",
            Self::Int32 => "int32",
        }
    }

    /// The type of this name: ours, or PyTorch's and vLLM's (`bfloat16`, `float8_e4m3fn`, `fp8`).
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        Some(match name {
            "bfloat16" => Self::Bf16,
            "float16" | "half" | "fp16" => Self::F16,
            "float32" | "float" | "fp32" => Self::F32,
            "fp8" | "float8_e4m3fn" => Self::F8E4m3,
            "float8_e5m2" => Self::F8E5m2,
            "float8_e4m3fnuz" => Self::F8E4m3Fnuz,
            "float8_e5m2fnuz" => Self::F8E5m2Fnuz,
            "float8_e8m0fnu" => Self::F8E8m0,
            _ => return Self::ALL.into_iter().find(|d| d.name() == name),
        })
    }

    /// The code in the canonical encoding. Never reused, never renumbered.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Bf16 => 1,
            Self::F16 => 2,
            Self::F32 => 3,
            Self::F8E4m3 => 4,
            Self::F8E5m2 => 5,
            Self::F8E4m3Fnuz => 6,
            Self::F8E5m2Fnuz => 7,
            Self::F8E8m0 => 8,
            Self::F4E2m1x2 => 9,
            Self::Int8 => 10,
            Self::Uint8 => 11,
            Self::Int32 => 12,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_parse_back() {
        for (i, d) in DType::ALL.into_iter().enumerate() {
            assert_eq!(DType::from_name(d.name()), Some(d));
            assert_eq!(usize::from(d.code()), i + 1);
        }
        assert_eq!(DType::from_name("torch.bfloat16"), Some(DType::Bf16));
        assert_eq!(DType::from_name("bf17"), None);
    }
}
