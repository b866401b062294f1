//! What a peer must know to connect to a rank, as bytes that an engine's own control plane carries.
//! No device code: a scheduler process can read them.
//!
//! Metadata is not a secret and grants nothing: whoever connects must prove itself all the same.

use serde::{Deserialize, Serialize};

use crate::ids::{EngineId, Generation, Rank};
use crate::ticket::is_host_port;
use crate::wire::{Blob, WireError, limits};

/// Most bytes that metadata may have.
pub const MAX_METADATA_BYTES: usize = 4096;
/// Most bytes of an address.
const MAX_ADDRESS_BYTES: usize = 512;

/// Where a rank listens, and who it is. Made by [`Engine::metadata`](crate::Engine::metadata), read
/// by [`Engine::connect_with`](crate::Engine::connect_with).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// The engine.
    pub engine: EngineId,
    /// This life of it.
    pub generation: Generation,
    /// The rank.
    pub rank: Rank,
    /// Where it listens, as `host:port`.
    pub address: String,
}

/// Why bytes are not metadata.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// Longer than metadata may be.
    #[error("metadata of {len} bytes, at most {MAX_METADATA_BYTES} are allowed")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// They do not decode, or do not encode.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The engine has no name, too long a one, or one with control characters.
    #[error(
        "the engine's name has {len} bytes or control characters; from 1 to {} are allowed",
        limits::ENGINE_ID
    )]
    Engine {
        /// Its length in bytes.
        len: usize,
    },
    /// The address is not `host:port`.
    #[error("address {address:?} is not host:port")]
    Address {
        /// The address as given, or its beginning.
        address: String,
    },
}

impl Metadata {
    /// Encodes it.
    ///
    /// # Errors
    ///
    /// A field is out of bounds: what is refused on the way in is not given out either.
    pub fn to_bytes(&self) -> Result<Vec<u8>, MetadataError> {
        self.check()?;
        Ok(Blob::pack("metadata", self)?.0)
    }

    /// Decodes and checks what [`to_bytes`](Self::to_bytes) made.
    ///
    /// # Errors
    ///
    /// Anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MetadataError> {
        if bytes.len() > MAX_METADATA_BYTES {
            return Err(MetadataError::TooLong { len: bytes.len() });
        }
        let metadata: Self = Blob(bytes.to_vec()).unpack("metadata")?;
        metadata.check()?;
        Ok(metadata)
    }

    fn check(&self) -> Result<(), MetadataError> {
        let name = &*self.engine.0;
        let len = name.len();
        if len == 0 || len > limits::ENGINE_ID || name.chars().any(char::is_control) {
            return Err(MetadataError::Engine { len });
        }
        if self.address.len() > MAX_ADDRESS_BYTES || !is_host_port(&self.address) {
            let address = self.address.chars().take(64).collect();
            return Err(MetadataError::Address { address });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn metadata(engine: &str, address: &str) -> Metadata {
        Metadata {
            engine: engine.into(),
            generation: Generation([7; 16]),
            rank: Rank::default(),
            address: address.to_owned(),
        }
    }

    #[test]
    fn it_comes_back() {
        for address in ["127.0.0.1:7301", "[::1]:1", "host-7.example.com:65535"] {
            let metadata = metadata("prefill", address);
            let bytes = metadata.to_bytes().expect("within bounds");
            assert_eq!(Metadata::from_bytes(&bytes), Ok(metadata));
            let longer = [&bytes[..], &[0]].concat();
            assert!(matches!(
                Metadata::from_bytes(&longer),
                Err(MetadataError::Wire(WireError::Trailing { .. }))
            ));
            for cut in 0..bytes.len() {
                assert!(Metadata::from_bytes(&bytes[..cut]).is_err());
            }
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_both_ways() {
        let long = "x".repeat(limits::ENGINE_ID + 1);
        for bad in [
            metadata("", "h:1"),
            metadata(&long, "h:1"),
            metadata("a\nb", "h:1"),
            metadata("e", ""),
            metadata("e", "h"),
            metadata("e", "h:0"),
            metadata("e", "h:99999"),
            metadata("e", "a b:1"),
            metadata("e", &format!("{}:1", "h".repeat(600))),
        ] {
            assert!(bad.to_bytes().is_err(), "{bad:?}");
            let bytes = Blob::pack("metadata", &bad).expect("it encodes").0;
            assert!(Metadata::from_bytes(&bytes).is_err(), "{bad:?}");
        }
        let most = vec![0x94; MAX_METADATA_BYTES + 1];
        let len = most.len();
        assert_eq!(
            Metadata::from_bytes(&most),
            Err(MetadataError::TooLong { len })
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_metadata_or_not(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
            if let Ok(metadata) = Metadata::from_bytes(&bytes) {
                let again = metadata.to_bytes().expect("what was taken");
                prop_assert_eq!(Metadata::from_bytes(&again), Ok(metadata));
            }
        }
    }
}
