//! Archives that the kernel unpacks into its first root: cpio's "newc" format. Several, one behind
//! the other, count as one.

/// An archive being written.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(super) fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    pub(super) fn program(&mut self, name: &str, data: &[u8]) {
        self.entry(name, 0o100_755, data);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        // Owner, group, time, device numbers and checksum are 0; the name ends with a zero byte.
        let (inode, links) = (self.entries, 1);
        let (size, name_size) = (data.len(), name.len() + 1);
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}\
             {0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
            0
        );
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read back as the format's description has it.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        let mut take = |n: usize, pad: bool| {
            let (taken, rest) = bytes.split_at(n);
            at += n;
            let skip = if pad { at.next_multiple_of(4) - at } else { 0 };
            at += skip;
            bytes = &rest[skip..];
            taken
        };
        loop {
            let header = String::from_utf8(take(110, false).to_vec()).unwrap();
            assert_eq!(&header[..6], "070701");
            let field = |i: usize| u32::from_str_radix(&header[6 + 8 * i..][..8], 16).unwrap();
            let name = take(field(11) as usize, true);
            let data = take(field(6) as usize, true);
            let name = std::ffi::CStr::from_bytes_with_nul(name).unwrap();
            let name = name.to_str().unwrap().to_owned();
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, field(1), data.to_vec()));
        }
    }

    #[test]
    fn what_was_put_in_comes_out() {
        let mut archive = Archive::default();
        archive.folder("bin");
        for length in 0..9 {
            archive.program(&"bin/abcdefgh"[..5 + length % 5], &vec![7; length]);
        }
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let read = entries(&bytes);
        assert_eq!(read.len(), 10);
        assert_eq!(read[0], ("bin".into(), 0o040_755, Vec::new()));
        assert_eq!(read[4], ("bin/abcd".into(), 0o100_755, vec![7; 3]));
    }
}
