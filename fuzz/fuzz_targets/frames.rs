//! A byte stream, cut into pieces, read as frames. Pieces must not matter.
#![no_main]

use kvxfer::wire::{Frame, FrameReader, Side, Transcript, WireError};
use libfuzzer_sys::fuzz_target;

fn reader(sealed: bool) -> FrameReader {
    let mut reader = FrameReader::new(4096);
    if sealed {
        reader.unseal(Transcript::new().keys(None).frames_from(Side::Client), 4096);
    }
    reader
}

fn read(sealed: bool, pieces: &mut dyn Iterator<Item = &[u8]>) -> (Vec<Frame>, Option<WireError>) {
    let (mut reader, mut frames) = (reader(sealed), Vec::new());
    for piece in pieces {
        reader.push(piece);
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => {
                    assert!(frame.payload.len() <= 4096);
                    frames.push(frame);
                }
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

fuzz_target!(|data: &[u8]| {
    let Some(([mode, cut], bytes)) = data.split_first_chunk::<2>() else {
        return;
    };
    let sealed = mode & 1 == 1;
    let whole = read(sealed, &mut std::iter::once(bytes));
    let pieces = read(sealed, &mut bytes.chunks(usize::from(*cut).max(1)));
    assert_eq!(whole, pieces);
});
