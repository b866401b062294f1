//! What is wrong before a queue pair works, and how it is told.

use std::time::Instant;

use crate::init;
use crate::support::*;
use kvxfer_verbs::*;

#[test]
fn bring_up_names_what_is_wrong() {
    let (a, b) = (
        open_soft(SoftConfig::default()).unwrap(),
        open_soft(SoftConfig::default()).unwrap(),
    );
    let dial = |peer: DeviceAddr, path| Link::SoftDial {
        peer,
        path,
        deadline: Instant::now() + WAIT,
    };
    let fault = |remote: QpEndpoint, link| {
        let (_cq, qp) = init(&a);
        qp.rtr(RtrAttr {
            remote,
            link,
            min_rnr_timer: 12,
        })
        .unwrap_err()
    };
    let (_cq, peer) = init(&b);
    let good = peer.endpoint();

    let e = fault(
        QpEndpoint {
            token: [0; 16],
            port: None,
            ..good
        },
        dial(b.address(), SoftPath::Arena),
    );
    assert!(
        matches!(
            e,
            Error::Transition {
                fault: StateFault::EmptyEndpoint,
                ..
            }
        ),
        "{e}"
    );
    let e = fault(
        QpEndpoint {
            token: [9; 16],
            port: None,
            ..good
        },
        dial(b.address(), SoftPath::Arena),
    );
    assert!(
        matches!(
            e,
            Error::Path {
                fault: PathFault::Token,
                ..
            }
        ),
        "{e}"
    );
    let e = fault(
        QpEndpoint {
            qpn: good.qpn ^ 1,
            ..good
        },
        dial(b.address(), SoftPath::Arena),
    );
    assert!(
        matches!(
            e,
            Error::Transition {
                fault: StateFault::EndpointMismatch { .. },
                ..
            }
        ),
        "{e}"
    );
    let mut far = b.address();
    far.host = "another".to_owned();
    let e = fault(good, dial(far, SoftPath::Arena));
    assert!(
        matches!(
            e,
            Error::Path {
                fault: PathFault::OtherHost { .. },
                ..
            }
        ),
        "{e}"
    );
    let mut gone = b.address();
    gone.name.push('x');
    let e = fault(good, dial(gone, SoftPath::Arena));
    assert!(
        matches!(
            e,
            Error::Path {
                fault: PathFault::Connect(_),
                ..
            }
        ),
        "{e}"
    );

    // The dialler comes first, with another path than the one awaited.
    let (_cq2, other) = init(&a);
    let ea = other.endpoint();
    let attr = RtrAttr {
        remote: good,
        link: dial(b.address(), SoftPath::ProcessVm),
        min_rnr_timer: 12,
    };
    let _other = other.rtr(attr).unwrap();
    let link = Link::SoftAwait {
        path: SoftPath::Arena,
    };
    let e = peer
        .rtr(RtrAttr {
            remote: ea,
            link,
            min_rnr_timer: 12,
        })
        .unwrap_err();
    assert!(
        matches!(
            e,
            Error::Transition {
                fault: StateFault::PathMismatch { .. },
                ..
            }
        ),
        "{e}"
    );
}

#[test]
fn probes_say_whether_a_path_leads_there() {
    let (a, b) = (
        open_soft(SoftConfig::default()).unwrap(),
        open_soft(SoftConfig::default()).unwrap(),
    );
    for path in [SoftPath::Arena, SoftPath::ProcessVm] {
        a.probe(&b.address(), path).unwrap();
        a.probe(&a.address(), path).unwrap();
    }
    let gone = {
        let c = open_soft(SoftConfig::default()).unwrap();
        c.address()
    };
    assert!(a.probe(&gone, SoftPath::Arena).is_err());
    assert!(open_null().probe(&b.address(), SoftPath::Arena).is_err());
}

#[test]
fn handles_of_two_contexts_do_not_mix() {
    let (a, b) = (
        open_soft(SoftConfig::default()).unwrap(),
        open_soft(SoftConfig::default()).unwrap(),
    );
    let pd = a.alloc_pd().unwrap();
    let (ca, cb) = (a.create_cq(4).unwrap(), b.create_cq(4).unwrap());
    let e = pd.create_qp(QpCaps::default(), &ca, &cb).unwrap_err();
    assert!(matches!(e, Error::ForeignHandle { .. }), "{e}");
    let caps = QpCaps {
        max_send_wr: 0,
        ..QpCaps::default()
    };
    assert!(matches!(
        pd.create_qp(caps, &ca, &ca),
        Err(Error::Limit { .. })
    ));
}

#[test]
fn secrets_stay_out_of_debug_output() {
    let (a, _b) = pair(How::Arena);
    let (_cq, qp) = init(&a.ctx);
    let token = format!("{:?}", qp.endpoint().token);
    for text in [
        format!("{:?}", qp.endpoint()),
        format!("{qp:?}"),
        format!("{:?}", a.ctx),
    ] {
        assert!(!text.contains(&token) && !text.contains("token"), "{text}");
    }
}
