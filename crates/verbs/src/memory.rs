//! The memory token: what a device needs to know of memory, without a borrow of its bytes.

use std::any::Any;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::str::FromStr;

/// Where a device sits, the same in every process and container of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The domain (segment).
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device, below 32.
    pub device: u8,
    /// The function, below 8.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (domain, bus) = (self.domain, self.bus);
        write!(
            f,
            "{domain:04x}:{bus:02x}:{:02x}.{}",
            self.device, self.function
        )
    }
}

/// A text that is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI address: one looks like 0000:1b:00.0")]
pub struct NotPciAddress(pub String);

impl FromStr for PciAddress {
    type Err = NotPciAddress;

    /// Reads `domain:bus:device.function`, all hexadecimal; the domain may be left out.
    fn from_str(text: &str) -> Result<Self, NotPciAddress> {
        let read = || {
            let hex = |part: &str| {
                let digits = part.bytes().all(|b| b.is_ascii_hexdigit());
                digits.then(|| u32::from_str_radix(part, 16).ok()).flatten()
            };
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            let address = Self {
                domain: hex(domain)?,
                bus: u8::try_from(hex(bus)?).ok()?,
                device: u8::try_from(hex(device)?).ok()?,
                function: u8::try_from(hex(function)?).ok()?,
            };
            (address.device < 32 && address.function < 8).then_some(address)
        };
        read().ok_or_else(|| NotPciAddress(text.to_owned()))
    }
}

/// Where memory lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Pages that this process's CPU reads and writes.
    Host,
    /// Memory of a GPU. Its addresses are the GPU's: the CPU never goes there.
    Device {
        /// The GPU.
        gpu: PciAddress,
    },
    /// Registers of a device, mapped into this process: doorbells. Whole words are written there, as the device
    /// wants them; they are not read, nor copied, nor registered with a NIC.
    Registers,
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host memory"),
            Self::Device { gpu } => write!(f, "memory of GPU {gpu}"),
            Self::Registers => f.write_str("a device's registers"),
        }
    }
}

/// The file behind memory that another process may map.
#[derive(Debug, Clone, Copy)]
pub struct FdSpan<'a> {
    /// A memfd sealed with `F_SEAL_SHRINK | F_SEAL_GROW`.
    pub fd: BorrowedFd<'a>,
    /// Where in the file the memory's first byte is.
    pub offset: u64,
}

/// Memory of a GPU as a file that a NIC's driver can register.
#[derive(Debug)]
pub struct DmaBuf {
    /// The dma-buf.
    pub fd: OwnedFd,
    /// Where in it the span begins.
    pub offset: u64,
    /// Bytes of the span.
    pub len: u64,
}

/// Why memory is not to be had as a dma-buf.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoDmaBuf {
    /// Whoever has the memory knows no dma-buf of it.
    #[error("its owner exports none")]
    NotExported,
    /// Whoever has the memory could not export it.
    #[error("{0}")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A span of memory that stays where it is for as long as the token lives.
///
/// The bytes may change at any moment, by a device, by a peer or by the engine that owns them, so
/// no reference to them is ever made: all access goes through raw pointers.
///
/// # Safety
///
/// For as long as the value lives, the implementor keeps these true:
/// - `addr()..addr() + len()` is mapped and does not move: where `kind()` is [`MemoryKind::Host`],
///   readable and writable by this process's CPU; where it is [`MemoryKind::Registers`], by its MMU, for words
///   that are written; where it is another, for the device that it names, and nobody may take an address of it for
///   a pointer;
/// - no Rust reference to those bytes exists while the memory is registered with a device;
/// - `addr()`, `len()`, `kind()` and `fd()` always answer the same;
/// - where `fd()` or `dma_buf()` answers, the file's bytes from `offset` are the same memory as the span.
pub unsafe trait Memory: Any + Send + Sync + fmt::Debug {
    /// The address of the first byte: in this process, or of the device that [`kind`](Self::kind) names.
    fn addr(&self) -> u64;

    /// The length in bytes.
    fn len(&self) -> u64;

    /// Whether the span has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the memory lives.
    fn kind(&self) -> MemoryKind;

    /// The file behind it, if another process may map it.
    fn fd(&self) -> Option<FdSpan<'_>>;

    /// Memory of a GPU as a dma-buf, which is made for the call: what an RDMA device registers it by. The file
    /// may be closed before the memory goes.
    ///
    /// # Errors
    ///
    /// [`NoDmaBuf`]; the memory may then be registered by its address.
    fn dma_buf(&self) -> Result<DmaBuf, NoDmaBuf> {
        Err(NoDmaBuf::NotExported)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pci_address_is_read_as_it_is_written() {
        let address = PciAddress {
            domain: 0x10,
            bus: 0xab,
            device: 0x1f,
            function: 7,
        };
        assert_eq!(address.to_string(), "0010:ab:1f.7");
        for text in ["0010:ab:1f.7", "00000010:AB:1F.7"] {
            assert_eq!(text.parse(), Ok(address));
        }
        let low = "1b:00.0".parse::<PciAddress>();
        assert_eq!(low.map(|a| a.to_string()), Ok("0000:1b:00.0".to_owned()));
        let high = "fedcba98:00:00.0".parse::<PciAddress>();
        assert_eq!(high.map(|a| a.domain), Ok(0xfedc_ba98));
    }

    #[test]
    fn what_is_no_pci_address_is_refused() {
        for text in [
            "",
            ".",
            ":.",
            "0:0",
            "0000:1b:00",
            "0000:1b:20.0",
            "0000:1b:00.8",
            "0000:100:00.0",
            "0000:1b:+1.0",
            "0000:1b:00.",
            "x:1b:00.0",
            "1:0000:1b:00.0",
            "100000000:1b:00.0",
        ] {
            let read = text.parse::<PciAddress>();
            assert_eq!(read, Err(NotPciAddress(text.to_owned())), "{text}");
        }
    }
}
