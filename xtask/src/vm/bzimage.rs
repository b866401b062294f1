//! The kernel inside a bzImage. Unpacked beforehand it starts in half the time, for an emulated
//! processor takes seconds to unpack it.

/// Where the header of the boot protocol says that things are.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

const XZ: &[u8] = b"\xfd7zXZ\0";

/// A kernel, packed with xz.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Payload<'a> {
    pub(super) xz: &'a [u8],
    /// The size of the kernel when unpacked, in bytes.
    pub(super) size: u32,
}

/// The packed kernel; `None` where `image` is no bzImage or is not packed with xz: it boots as it
/// is, only later.
pub(super) fn payload(image: &[u8]) -> Option<Payload<'_>> {
    let magic = image.get(MAGIC..)?.starts_with(b"HdrS");
    let version = image.get(VERSION..)?.first_chunk()?;
    // Older headers do not say where the payload is.
    if !magic || u16::from_le_bytes(*version) < 0x208 {
        return None;
    }
    let sectors = match *image.get(SETUP_SECTORS)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + number(image, PAYLOAD_OFFSET)? as usize;
    let length = number(image, PAYLOAD_LENGTH)? as usize;
    let payload = image.get(start..)?.get(..length)?;
    // The kernel's makefiles put the size behind what xz wrote.
    let (xz, size) = payload.split_last_chunk()?;
    let size = u32::from_le_bytes(*size);
    xz.starts_with(XZ).then_some(Payload { xz, size })
}

fn number(image: &[u8], at: usize) -> Option<u32> {
    let bytes = image.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(sectors: u8, packed: &[u8]) -> Vec<u8> {
        let start = if sectors == 0 {
            5
        } else {
            usize::from(sectors) + 1
        } * 512;
        let mut image = vec![0; start];
        image[SETUP_SECTORS] = sectors;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        let length = packed.len() as u32 + 4;
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend([0x90; 16]);
        image.extend(packed);
        image.extend(77_u32.to_le_bytes());
        image.extend([0xcc; 3]);
        image
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        let packed = [XZ, b"abc"].concat();
        let wanted = Payload {
            xz: &packed,
            size: 77,
        };
        for sectors in [0, 1, 27] {
            assert_eq!(payload(&image(sectors, &packed)).as_ref(), Some(&wanted));
        }
    }

    #[test]
    fn what_is_no_such_image_has_no_payload() {
        let packed = [XZ, b"abc"].concat();
        let good = image(3, &packed);
        for length in 0..good.len() - 3 {
            assert_eq!(payload(&good[..length]), None, "{length} bytes of it");
        }
        assert_eq!(payload(&image(3, b"\x28\xb5\x2f\xfd zstd")), None);
        let mut old = good.clone();
        old[VERSION] = 7;
        old[VERSION + 1] = 2;
        assert_eq!(payload(&old), None);
        let mut far = good.clone();
        far[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 8].fill(0xff);
        assert_eq!(payload(&far), None);
        let mut other = good;
        other[MAGIC] = b'x';
        assert_eq!(payload(&other), None);
    }
}
