//! Made by `cargo xtask kernels`; not for editing.

use super::{Format, Image, Provenance};

pub(super) const PROVENANCE: Provenance = Provenance {
    sources_sha256: "082138775461abd0ad794643f73cbe85e7158580fcb2ea712d6a4266e0bf5e40",
    compiler: "Debian clang version 22.1.8 (1~deb12u1)",
};

pub(super) const IMAGES: &[Image] = &[
    Image {
        target: "gfx90a",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx90a.hsaco"),
        sha256: "a3f7bcb1bc0f325edf411ed47afed2a97aef0f2584bbbd4552bde7d27a509c77",
        warp: 64,
    },
    Image {
        target: "gfx942",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx942.hsaco"),
        sha256: "de5b21b638acaea26c66b5d5ce370aa67183928423a0dd63833f6d67abdb5a11",
        warp: 64,
    },
    Image {
        target: "gfx950",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx950.hsaco"),
        sha256: "57978badd1461e7c7223b05baeee2977d946f67126d10daf301591a518262174",
        warp: 64,
    },
    Image {
        target: "gfx1100",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx1100.hsaco"),
        sha256: "aa775a48a930bb92300681a18dc8d08499de6b951ccba927178961c73c60a67b",
        warp: 32,
    },
    Image {
        target: "sm_80",
        format: Format::Ptx,
        bytes: concat!(include_str!("../../prebuilt/sm_80.ptx"), "\0").as_bytes(),
        sha256: "f2da7675bbe8bfecefe442027b423e95a16a689d5f9c5bdbd03f7a77265d35ee",
        warp: 32,
    },
    Image {
        target: "x86_64",
        format: Format::Host,
        bytes: include_bytes!("../../prebuilt/x86_64.so"),
        sha256: "e66cbab33e017f5ba0d4c0b8e12ace4b52639c4419f60a9c1d7207216779ec5d",
        warp: 32,
    },
    Image {
        target: "aarch64",
        format: Format::Host,
        bytes: include_bytes!("../../prebuilt/aarch64.so"),
        sha256: "8bdda97a0fbd31b28177f9f89cb2c1f732e7e7f7d2d07105ab3ecb1ec4df844d",
        warp: 32,
    },
];

pub(super) const POST_IMAGES: &[Image] = &[
    Image {
        target: "gfx90a",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx90a.hsaco"),
        sha256: "b4fd5d1917bd6ee0cb20441eaa0443afd4714596618da00ac6218f4183709372",
        warp: 64,
    },
    Image {
        target: "gfx942",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx942.hsaco"),
        sha256: "cdccb8549798a2de8172ae34dd0d5f1efdc2d8b3609532e34f6d350fff5392b4",
        warp: 64,
    },
    Image {
        target: "gfx950",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx950.hsaco"),
        sha256: "86f4753f8c8fae098668f2a0e3e15d13da0e5777bdbfc34d8e965592c46a70d6",
        warp: 64,
    },
    Image {
        target: "gfx1100",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx1100.hsaco"),
        sha256: "9771d065e09a30b537711da1e50b3dff1c9315713fa95fd775255f788cf46708",
        warp: 32,
    },
    Image {
        target: "sm_80",
        format: Format::Ptx,
        bytes: concat!(include_str!("../../prebuilt/post-sm_80.ptx"), "\0").as_bytes(),
        sha256: "691fa2075f388e90944849e8ea943c9ca25822302cc7a1fb4bd76612b6b1a80f",
        warp: 32,
    },
];
