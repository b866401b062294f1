//! Stretches that are packed into pinned memory and unpacked from there.

use kvxfer_hipmem::gather::{GatherEnd, GatherFault, GatherOptions, GpuKernels, PieceList};
use kvxfer_hipmem::gpu::{GpuMemory, PinnedMemory, Place, Stream};
use kvxfer_hipmem::kernels::Piece;
use kvxfer_hipmem::{Error, HostArena};

use crate::{Outcome, gpu, pattern, soon};

const LEN: u64 = 3 << 20;

/// Stretches of odd lengths from odd places, packed behind each other with a grain.
fn stretches(grain: u64) -> (Vec<Piece>, u64) {
    let mut pieces = Vec::new();
    let (mut src, mut dst) = (3_u64, 0_u64);
    for i in 0..200_u64 {
        let len = 1 + i * 131 % 9001;
        pieces.push(Piece { src, dst, len });
        src += len + i % 17;
        dst = (dst + len).next_multiple_of(grain);
    }
    // One that is cut, and one that is nothing.
    pieces.push(Piece {
        src,
        dst,
        len: 777_777,
    });
    pieces.push(Piece {
        src: 0,
        dst: 0,
        len: 0,
    });
    (pieces, dst + 777_777)
}

#[test]
fn what_is_packed_and_unpacked_is_what_was_there() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    for (grain, most) in [(1, None), (16, Some(1)), (256, Some(3))] {
        let (pieces, packed) = stretches(grain);
        let (from, to) = (GpuMemory::new(&gpu, LEN)?, GpuMemory::new(&gpu, LEN)?);
        let arena = HostArena::new(packed)?;
        let pinned = PinnedMemory::register(&gpu, arena.memory())?;
        let bytes = pattern(LEN as usize, 7);
        from.write(0, &bytes)?;
        to.write(0, &vec![0xee; LEN as usize])?;
        pinned.host().fill(0, packed, 0x11)?;
        let options = GatherOptions {
            max_workgroups: most,
            ..GatherOptions::default()
        };
        let run = |src, dst, pieces: &[Piece]| -> Outcome {
            let (first, second) = pieces.split_at(pieces.len() / 3);
            let list = |pieces| PieceList { src, dst, pieces };
            let lists = [list(first), list(second)];
            let mut gather = kernels.pieces(&stream, &lists, options)?;
            assert!(matches!(gather.wait(soon())?, GatherEnd::Whole));
            assert_eq!(gather.bytes(), pieces.iter().map(|p| p.len).sum::<u64>());
            Ok(())
        };
        run(Place::Gpu(&from, 0), Place::Pinned(&pinned, 0), &pieces)?;
        let back: Vec<Piece> = pieces
            .iter()
            .map(|p| Piece {
                src: p.dst,
                dst: p.src,
                len: p.len,
            })
            .collect();
        run(Place::Pinned(&pinned, 0), Place::Gpu(&to, 0), &back)?;
        let (mut wanted, mut got) = (vec![0xee; LEN as usize], vec![0; LEN as usize]);
        for piece in &pieces {
            let at = piece.src as usize..(piece.src + piece.len) as usize;
            wanted[at.clone()].copy_from_slice(&bytes[at]);
        }
        to.read(0, &mut got)?;
        assert!(got == wanted, "grain {grain}");
    }
    Ok(())
}

#[test]
fn stretches_beyond_either_memory_are_refused() -> Outcome {
    let gpu = gpu();
    let (kernels, stream) = (GpuKernels::load(&gpu)?, Stream::new(&gpu)?);
    let (src, dst) = (GpuMemory::new(&gpu, 1000)?, PinnedMemory::new(&gpu, 500)?);
    for (from, to, len, fits) in [
        (500, 0, 500, true),
        (501, 0, 500, false),
        (0, 1, 500, false),
        (u64::MAX, 0, 2, false),
        (0, u64::MAX, u64::MAX, false),
    ] {
        let pieces = [Piece {
            src: from,
            dst: to,
            len,
        }];
        let list = PieceList {
            src: Place::Gpu(&src, 0),
            dst: Place::Pinned(&dst, 0),
            pieces: &pieces,
        };
        let put = kernels.pieces(&stream, &[list], GatherOptions::default());
        match put {
            Ok(mut gather) => {
                assert!(fits, "{from} {to} {len}");
                assert!(matches!(gather.wait(soon())?, GatherEnd::Whole));
            }
            Err(error) => {
                assert!(!fits, "{error}");
                let Error::Gather(fault) = error else {
                    panic!("{error}");
                };
                assert!(matches!(*fault, GatherFault::Outside { .. }), "{fault}");
            }
        }
    }
    Ok(())
}
