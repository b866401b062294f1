//! The bytes of docs/wire-format.md.
use kvxfer::ids::{Generation, Nonce, Rank};
use kvxfer::rails::RailSet;
use kvxfer::wire::*;

use crate::pair::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// docs/wire-format.md in bytes: a change here is a change of the protocol, and needs a new version.
#[test]
fn the_encoding_is_the_documented_one() {
    let nonce = HandshakeNonce([0xab; 32]);
    let n32 = format!("c420{}", "ab".repeat(32));
    let hello = Hello {
        versions: VersionRange { min: 1, max: 2 },
        nonce,
        auth: AuthMode::SharedSecret,
        role: Role::Bench,
        max_frame: 65536,
    };
    // [[1, 2], bin, "SharedSecret", "Bench", 65536]
    let want = format!(
        "95920102{n32}ac{}a5{}ce00010000",
        hex(b"SharedSecret"),
        hex(b"Bench")
    );
    assert_eq!(hex(&hello.encode().unwrap()), want);
    let reject = Reject {
        code: RejectCode::Busy,
        versions: VersionRange { min: 1, max: 1 },
    };
    assert_eq!(hex(&reject.encode().unwrap()), "9205920101");

    let refuse = Refuse {
        reason: Refusal::FormatMismatch { detail: "d".into() },
    };
    let want = format!("9181ae{}91a164", hex(b"FormatMismatch"));
    assert_eq!(hex(&Message::from(refuse).encode().unwrap()), want);
    let refuse = Refuse {
        reason: Refusal::GenerationRetired,
    };
    let want = format!("91b1{}", hex(b"GenerationRetired"));
    assert_eq!(hex(&Message::from(refuse).encode().unwrap()), want);
    let offer = QpOffer {
        offer: 1,
        replaces: None,
        path: PathKind::ProcessVm,
        candidates: vec![Candidate {
            path: PathKind::Tcp,
            why_not: None,
        }],
        endpoints: vec![RailEndpoint {
            rail: 3,
            peer_rail: 2,
            endpoint: Blob(vec![0xee]),
        }],
    };
    let want = format!(
        "9501c0aa{}9192a3{}c091930302c401ee",
        hex(b"process-vm"),
        hex(b"tcp")
    );
    assert_eq!(hex(&Message::from(offer).encode().unwrap()), want);
    let done = PushDone {
        request: "r".into(),
        nonce: Nonce(5),
        sender: Rank {
            dp: 1,
            pp: 2,
            tp: 3,
        },
        bytes: 300,
        sums: 2,
        rails: RailSet::only(1) | RailSet::only(8),
        rail: 8,
    };
    assert_eq!(
        hex(&Message::from(done).encode().unwrap()),
        "97a1720593010203cd012c02cd010208"
    );
    assert_eq!(hex(&Message::from(Ready {}).encode().unwrap()), "90");
    let span = RemoteSpan {
        addr: 1,
        len: 2,
        rkey: 3,
    };
    let d = Describe {
        engine: "e".into(),
        generation: Generation([1; 16]),
        rank: Rank::default(),
        kv_role: KvRole::Both,
        wanted: None,
        fingerprint: Fingerprint([0xab; 32]),
        format: Blob(vec![]),
        placement: Blob(vec![]),
        rails: vec![RailDesc {
            place: 0,
            device: Blob(vec![]),
            memories: vec![span],
            leases: Some(span),
            scratch: None,
            staging: None,
        }],
        facts: ConfigFacts::default(),
        fd_backed: true,
        gpu: None,
        shared: None,
    };
    let want = format!(
        "9da165dc0010{}93000000a4{}c0{n32}c400c400919600c400919301020393010203c0c09700000000c20000c3c0c0",
        "01".repeat(16),
        hex(b"Both"),
    );
    assert_eq!(hex(&Message::from(d).encode().unwrap()), want);

    assert_eq!(
        hex(&Preamble {
            kind: ConnectionKind::Stream
        }
        .encode()),
        "8b4b56584645520a01020000"
    );
}

/// The key schedule and the tag, computed here from their definition.
#[test]
fn proofs_and_keys_are_the_documented_ones() {
    use hmac::{Hmac, Mac};
    use sha2::{Digest, Sha256};
    let mac = |key: &[u8], data: &[u8]| -> Vec<u8> {
        let mut m = Hmac::<Sha256>::new_from_slice(key).unwrap();
        m.update(data);
        m.finalize().into_bytes().to_vec()
    };
    let key = b"one secret of some length";
    let (to_server, to_client) = handshake_bytes(secret("one secret of some length"));
    // Auth is the last thing to the server: header, array of one, bin of 32.
    let auth_len = HEADER_LEN + 3 + 32;
    let (first, auth) = to_server.split_at(to_server.len() - auth_len);
    let (challenge, ok) = to_client.split_at(to_client.len() - auth_len);
    let before = [b"kvxfer/1 transcript", first, challenge].concat();
    let h0 = Sha256::digest(&before);
    let h1 = Sha256::digest([before.as_slice(), auth].concat());
    let proof = mac(key, &[b"kvxfer/1 client proof".as_slice(), &h0].concat());
    assert_eq!(hex(&auth[auth_len - 32..]), hex(&proof));
    let proof = mac(key, &[b"kvxfer/1 server proof".as_slice(), &h1].concat());
    assert_eq!(hex(&ok[auth_len - 32..]), hex(&proof));

    let prk = mac(&h1, key);
    let expand = |label: &str| mac(&prk, &[label.as_bytes(), &[1]].concat());
    let mut pair = Pair::new(
        config(secret("one secret of some length")),
        config(secret("one secret of some length")),
    );
    for _ in 0..2 {
        move_bytes(&mut pair.client, &mut pair.server, pair.now, usize::MAX);
        move_bytes(&mut pair.server, &mut pair.client, pair.now, usize::MAX);
    }
    assert_eq!(
        pair.client.session_id().unwrap().0,
        expand("kvxfer/1 session id")[..16]
    );
    for (s, label) in [
        (&mut pair.client, "kvxfer/1 frames client to server"),
        (&mut pair.server, "kvxfer/1 frames server to client"),
    ] {
        s.close(GoodbyeReason::Finished);
        let bytes = s.transmit();
        let (sealed, tag) = bytes.split_at(bytes.len() - TAG_LEN);
        assert_eq!(hex(tag), hex(&mac(&expand(label), sealed)[..TAG_LEN]));
        // Two handshake frames went before it.
        assert_eq!(hex(&sealed[4..HEADER_LEN]), "3e0000000000000000000002");
    }
}
