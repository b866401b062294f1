use super::super::Source;
use super::super::listing::wanted;

fn problems(arch: &str, listing: &str) -> Vec<String> {
    super::problems(Source::Kvx, arch, listing)
}

/// A listing as llvm-objdump prints it, cut down to what is looked at.
fn good(arch: &str) -> String {
    let (acquire, release, system) = match arch {
        "gfx90a" => (
            "buffer_invl2\n\tbuffer_wbinvl1_vol\n\ts_waitcnt vmcnt(0)",
            "buffer_wbl2\n\ts_waitcnt vmcnt(0)",
            " glc",
        ),
        "gfx1100" => (
            "s_waitcnt_vscnt null, 0x0\n\tbuffer_gl1_inv\n\tbuffer_gl0_inv\n\ts_waitcnt vmcnt(0)",
            "s_waitcnt_vscnt null, 0x0",
            " glc",
        ),
        _ => (
            "buffer_inv sc0 sc1\n\ts_waitcnt vmcnt(0)",
            "buffer_wbl2 sc0 sc1\n\ts_waitcnt vmcnt(0)",
            " sc0 sc1",
        ),
    };
    let xcc = match arch {
        "gfx942" | "gfx950" => "\ts_getreg_b32 s0, hwreg(HW_REG_XCC_ID, 0, 4)\n",
        _ => "",
    };
    let wait = "\ts_waitcnt vmcnt(0) lgkmcnt(0)";
    let fence = |name: &str, fence: &str| {
        format!(
            "0000000000002100 <{name}>:\n{wait}  // 0000: BF8C0070\n\t{fence}\n{xcc}\
             \tglobal_store_dwordx4 v3, v[0:3], s[0:1]\n\ts_endpgm\n\n"
        )
    };
    let verify = format!(
        "0000000000002300 <kvx_verify>:\n{wait}\n\t{acquire}\n\
         \tglobal_load_dwordx2 v[0:1], v[2:3], off{system}\n\tds_write_b64 v1, v[2:3]\n\
         \tglobal_store_dwordx2 v0, v[0:1], s[0:1]\n\ts_endpgm\n\n"
    );
    let end = if xcc.is_empty() { "" } else { system };
    let (loads, stores): (String, String) = (0..4)
        .map(|i| {
            (
                format!("\tglobal_load_dwordx4 v[{i}], v[6:7], off\n"),
                format!("\tglobal_store_dwordx4 v[4:5], v[{i}], off\n"),
            )
        })
        .unzip();
    let gather = format!(
        "0000000000003100 <kvx_gather>:\n\tglobal_load_dword v0, v1, s[0:1]{system}\n{wait}\n\
         \t{acquire}\n{loads}\ts_waitcnt vmcnt(0)\n{stores}{wait}\n\ts_barrier\n\
         \tglobal_store_dwordx4 v5, v[0:3], s[0:1]\n{wait}\n\t{release}\n\
         \tglobal_store_dwordx2 v5, v[6:7], s[0:1] offset:24{end}\n\ts_endpgm\n"
    );
    let all = fence("kvx_acquire", acquire) + &fence("kvx_release", release) + &verify + &gather;
    if arch == "gfx1100" {
        all.replace("_dwordx4", "_b128").replace("_dwordx2", "_b64")
    } else {
        all
    }
}

const ARCHES: [&str; 4] = ["gfx90a", "gfx942", "gfx950", "gfx1100"];

#[test]
fn good_listings_are_good() {
    for arch in ARCHES {
        assert_eq!(problems(arch, &good(arch)), [""; 0], "{arch}");
    }
    assert_eq!(problems("gfx908", "").len(), 1);
    assert_eq!(problems("gfx942", "").len(), 4);
}

/// The listing with one thing changed in one kernel is found out.
fn caught(arch: &str, kernel: &str, from: &str, to: &str, wanted: &str) {
    let text = good(arch);
    let start = text.find(&format!("<{kernel}>:")).expect("it is there");
    let (before, rest) = text.split_at(start);
    let end = rest.find("s_endpgm").expect("it ends") + "s_endpgm".len();
    let (body, after) = rest.split_at(end);
    assert!(body.contains(from), "{arch} {kernel} has no {from}");
    let text = format!("{before}{}{after}", body.replace(from, to));
    let found = problems(arch, &text);
    assert!(
        found
            .iter()
            .any(|p| p.contains(kernel) && p.contains(wanted)),
        "{arch} {kernel}: {from} -> {to}: {found:?}"
    );
}

#[test]
fn a_fence_that_lacks_an_instruction_is_found() {
    for arch in ["gfx942", "gfx950"] {
        // What the compilers with the bug make of it.
        let bug = "buffer_wbl2 sc0 sc1\n\ts_waitcnt vmcnt(0)";
        caught(
            arch,
            "kvx_release",
            bug,
            "buffer_wbl2 sc0 sc1",
            "no release fence",
        );
        caught(
            arch,
            "kvx_gather",
            bug,
            "buffer_wbl2 sc0 sc1",
            "no release fence",
        );
        // Of agent scope.
        caught(
            arch,
            "kvx_release",
            "buffer_wbl2 sc0 sc1",
            "buffer_wbl2 sc1",
            "no release fence",
        );
        caught(
            arch,
            "kvx_acquire",
            "buffer_inv sc0 sc1",
            "buffer_inv sc1",
            "no acquire fence",
        );
        caught(
            arch,
            "kvx_verify",
            "buffer_inv sc0 sc1",
            "buffer_inv sc1",
            "no acquire fence",
        );
        caught(
            arch,
            "kvx_gather",
            "buffer_inv sc0 sc1",
            "buffer_inv sc1",
            "no acquire fence",
        );
        caught(
            arch,
            "kvx_acquire",
            "HW_REG_XCC_ID",
            "HW_REG_HW_ID",
            "where it runs",
        );
        caught(
            arch,
            "kvx_release",
            "HW_REG_XCC_ID",
            "HW_REG_HW_ID",
            "where it runs",
        );
    }
    caught(
        "gfx90a",
        "kvx_release",
        "buffer_wbl2\n",
        "\n",
        "no release fence",
    );
    caught(
        "gfx90a",
        "kvx_acquire",
        "buffer_invl2\n",
        "\n",
        "no acquire fence",
    );
    caught(
        "gfx90a",
        "kvx_acquire",
        "buffer_wbinvl1_vol\n",
        "\n",
        "no acquire fence",
    );
    caught(
        "gfx1100",
        "kvx_acquire",
        "buffer_gl1_inv\n",
        "\n",
        "no acquire fence",
    );
    caught(
        "gfx1100",
        "kvx_acquire",
        "buffer_gl0_inv\n",
        "\n",
        "no acquire fence",
    );
    caught(
        "gfx1100",
        "kvx_release",
        "s_waitcnt_vscnt null, 0x0",
        "s_nop 0",
        "no release fence",
    );
}

#[test]
fn what_touches_more_than_it_may_is_found() {
    for arch in ARCHES {
        let end = "s_endpgm";
        for kernel in ["kvx_acquire", "kvx_release", "kvx_verify", "kvx_gather"] {
            for bad in [
                "global_atomic_or v0, v[0:1], v2, off",
                "flat_atomic_add v[0:1], v2",
                "flat_load_dwordx4 v[0:3], v[4:5]",
                "buffer_atomic_or v0, off, s[0:3], 0",
                "scratch_store_dword off, v0, off",
                "ds_add_u32 v0, v1",
                "s_store_dword s0, s[0:1], 0x0",
            ] {
                caught(arch, kernel, end, &format!("{bad}\n\t{end}"), bad);
            }
        }
        let store = format!("global_store_dword v0, v1, s[0:1]\n\t{end}");
        caught(arch, "kvx_acquire", end, &store, "more than its one record");
        caught(arch, "kvx_release", end, &store, "more than its one record");
        caught(arch, "kvx_verify", end, &store, "more than its one sum");
        caught(arch, "kvx_gather", end, &store, "what follows the release");
        let load = format!("global_load_dword v0, v1, s[0:1]\n\t{end}");
        caught(arch, "kvx_acquire", end, &load, "loads something");
        caught(arch, "kvx_verify", end, &load, "not of system scope");
        caught(
            arch,
            "kvx_verify",
            "global_load_",
            "s_load_",
            "loads nothing",
        );
        caught(
            arch,
            "kvx_gather",
            "offset:24",
            "offset:16",
            "what follows the release",
        );
    }
}

#[test]
fn a_gather_that_waits_for_each_load_is_found() {
    for arch in ARCHES {
        let load = if arch == "gfx1100" {
            "global_load_b128"
        } else {
            "global_load_dwordx4"
        };
        let waits = format!("s_waitcnt vmcnt(1)\n\t{load}");
        caught(arch, "kvx_gather", load, &waits, "1 loads of 16 bytes");
        let lone = format!("s_waitcnt lgkmcnt(0)\n\t{load}");
        let text = good(arch).replace(load, &lone);
        assert_eq!(problems(arch, &text), [""; 0], "{arch}");
    }
}

/// What a post of `arch` is, cut down to what is looked at.
fn good_posts(arch: &str) -> String {
    let (acquire, release, system) = match arch {
        "gfx90a" => (
            "buffer_invl2\n\tbuffer_wbinvl1_vol\n\ts_waitcnt vmcnt(0)",
            "buffer_wbl2\n\ts_waitcnt vmcnt(0)",
            "",
        ),
        "gfx1100" => (
            "s_waitcnt_vscnt null, 0x0\n\tbuffer_gl1_inv\n\tbuffer_gl0_inv\n\ts_waitcnt vmcnt(0)",
            "s_waitcnt_vscnt null, 0x0",
            "",
        ),
        _ => (
            "buffer_inv sc0 sc1\n\ts_waitcnt vmcnt(0)",
            "buffer_wbl2 sc0 sc1\n\ts_waitcnt vmcnt(0)",
            " sc0 sc1",
        ),
    };
    let wait = "\ts_waitcnt vmcnt(0) lgkmcnt(0)";
    let slot = "\tglobal_store_dwordx4 v[0:1], v[2:5], off\n".repeat(3);
    let text: String = wanted(Source::Post)
        .iter()
        .map(|name| {
            if *name == "kvx_push_blocks" {
                let load = "\tglobal_load_dwordx4 v[2:5], v[0:1], off\n".repeat(4);
                return format!(
                    "0000000000002100 <{name}>:\n{load}{wait}\n{slot}{wait}\n\t{release}\n\
                     \tglobal_store_dwordx4 v[0:1], v[2:5], off\n\ts_endpgm\n\n"
                );
            }
            format!(
                "0000000000002100 <{name}>:\n\tglobal_load_dwordx2 v[0:1], v2, s[0:1] sc1\n\
                 {wait}\n\t{acquire}\n\ts_nop 0\n\tglobal_store_dword v1, v2, s[2:3]{system}\n\
                 \tglobal_atomic_cmpswap_x2 v[0:1], v2, v[2:5], s[0:1] sc0\n\
                 {slot}{wait}\n\t{release}\n\
                 \tglobal_store_dwordx2 v[0:1], v[2:3], off sc1\n\ts_sleep 2\n\
                 \tglobal_store_dword v1, v2, s[4:5]{system}\n{wait}\n\t{release}\n\
                 \tglobal_store_dwordx2 v1, v[2:3], s[6:7]{system}\n\
                 {slot}\tglobal_store_dwordx2 v[0:1], v[2:3], off offset:48\n{wait}\n\
                 \t{release}\n\tglobal_store_dwordx2 v[0:1], v[2:3], off offset:56{system}\n\
                 \ts_endpgm\n\n"
            )
        })
        .collect();
    if arch == "gfx1100" {
        text.replace("_dwordx4", "_b128")
            .replace("cmpswap_x2", "cmpswap_b64")
            .replace("_dwordx2", "_b64")
            .replace("store_dword ", "store_b32 ")
    } else {
        text
    }
}

#[test]
fn good_posts_are_good() {
    for arch in ARCHES {
        let found = super::problems(Source::Post, arch, &good_posts(arch));
        assert_eq!(found, [""; 0], "{arch}");
    }
}

#[test]
fn posts_in_another_order_are_found() {
    for arch in ARCHES {
        let text = good_posts(arch);
        let (phase, record, ready, release) = match arch {
            "gfx1100" => (
                "global_store_b64 v[0:1], v[2:3], off offset:56",
                "global_store_b32 v1, v2, s[4:5]",
                "global_store_b64 v[0:1], v[2:3], off sc1",
                "s_waitcnt_vscnt null, 0x0",
            ),
            _ => (
                "global_store_dwordx2 v[0:1], v[2:3], off offset:56",
                "global_store_dword v1, v2, s[4:5]",
                "global_store_dwordx2 v[0:1], v[2:3], off sc1",
                "buffer_wbl2",
            ),
        };
        let system = if arch.starts_with("gfx94") || arch == "gfx950" {
            " sc0 sc1"
        } else {
            ""
        };
        let twice = format!("{phase}{system}\n\ts_sleep 2");
        let cases = [
            (
                "s_sleep 2",
                twice.as_str(),
                "not one place that stores a phase",
            ),
            (release, "s_nop 0", "between a descriptor and its phase"),
            (phase, "s_nop 0", "between a descriptor and its phase"),
            (release, "s_nop 0", "no release after a WQE"),
            (release, "s_nop 0", "no word that a WQE is ready"),
            (ready, "s_nop 0", "no word that a WQE is ready"),
            (release, "s_nop 0", "no release between the copies"),
            (
                "s_waitcnt vmcnt(0) lgkmcnt(0)\n\t",
                "",
                "no release between the copies",
            ),
            (release, "s_nop 0", "between a record and its doorbell"),
            (record, "s_nop 0", "between a record and its doorbell"),
            ("s_sleep", "s_nop", "without a pause"),
            (
                "s_endpgm",
                "global_atomic_add v0, v1, s[0:1]\n\ts_endpgm",
                "has global_atomic_add",
            ),
            (
                "s_endpgm",
                "scratch_store_dword off, v0, off\n\ts_endpgm",
                "has scratch",
            ),
        ];
        for (from, to, wanted) in cases {
            assert!(text.contains(from), "{arch} has no {from}");
            let found = super::problems(Source::Post, arch, &text.replace(from, to));
            assert!(
                found.iter().any(|p| p.contains(wanted)),
                "{arch}: {from} -> {to}: {found:?}"
            );
        }
    }
    let text = good_posts("gfx942");
    for (from, to, wanted) in [
        ("buffer_inv sc0 sc1", "buffer_inv sc1", "no acquire before"),
        (
            "offset:56 sc0 sc1",
            "offset:56 sc1",
            "between a descriptor and its phase",
        ),
    ] {
        let found = super::problems(Source::Post, "gfx942", &text.replace(from, to));
        assert!(found.iter().any(|p| p.contains(wanted)), "{found:?}");
    }
    // What moves blocks may not swap, whatever posts may.
    let end = "s_endpgm";
    let swap = "global_atomic_cmpswap_x2 v[0:1], v2, v[2:5], s[0:1] sc0\n\ts_endpgm";
    caught("gfx942", "kvx_gather", end, swap, "cmpswap");
}
