//! Queues of devices in memory of the host.

use kvxfer_verbs::mlx5::{OutsideQueue, QueueMemory};

use crate::memory::HostMemory;

impl QueueMemory for HostMemory {
    fn len(&self) -> u64 {
        Self::len(self)
    }

    fn load(&self, offset: u64) -> Result<[u8; 8], OutsideQueue> {
        let len = Self::len(self);
        let word = self.load_u64(offset);
        Ok(word
            .map_err(|_| OutsideQueue { offset, len })?
            .to_ne_bytes())
    }

    fn store(&self, offset: u64, bytes: [u8; 8]) -> Result<(), OutsideQueue> {
        let len = Self::len(self);
        let stored = self.store_u64(offset, u64::from_ne_bytes(bytes));
        stored.map_err(|_| OutsideQueue { offset, len })
    }
}

#[cfg(test)]
mod tests {
    use kvxfer_verbs::mlx5::{OutsideQueue, QueueMemory};

    use crate::HostBuffer;

    #[test]
    fn words_are_bytes_as_they_lie() {
        let buffer = HostBuffer::new(64).expect("memory");
        let memory = buffer.memory();
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        memory.store(56, bytes).expect("inside");
        assert_eq!(memory.load(56), Ok(bytes));
        let mut found = [0; 8];
        memory.read(56, &mut found).expect("inside");
        assert_eq!(found, bytes);
        let len = QueueMemory::len(memory);
        for offset in [4, 57, 64, u64::MAX] {
            let outside = OutsideQueue { offset, len };
            assert_eq!(memory.load(offset), Err(outside));
            assert_eq!(memory.store(offset, bytes), Err(outside));
        }
    }
}
