use super::problems;

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
