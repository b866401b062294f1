//! The layouts of mlx5's queues, as a C compiler says them of `mlx5dv.h`; and what its functions write.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use quote::ToTokens;
use syn::{Expr, Item, Lit};

/// Functions of the header, for the tests to call. They take and give host byte order, as its
/// callers do; the immediate goes as it is.
const WRITERS: &str = "
void kvxfer_mlx5_ctrl(void *at, uint16_t pi, uint8_t opcode, uint32_t qpn, uint8_t fm_ce_se,
                      uint8_t ds, uint32_t imm) {
    mlx5dv_set_ctrl_seg(at, pi, opcode, 0, qpn, fm_ce_se, ds, 0, imm);
}
void kvxfer_mlx5_data(void *at, uint32_t length, uint32_t lkey, uint64_t address) {
    mlx5dv_set_data_seg(at, length, lkey, address);
}
void kvxfer_mlx5_raddr(struct mlx5_wqe_raddr_seg *at, uint64_t raddr, uint32_t rkey) {
    at->raddr = htobe64(raddr);
    at->rkey = htobe32(rkey);
    at->reserved = 0;
}
void kvxfer_mlx5_cqe(struct mlx5_cqe64 *at, uint32_t sop_qpn, uint32_t byte_cnt, uint16_t counter,
                     uint8_t opcode, uint8_t owner) {
    at->sop_drop_qpn = htobe32(sop_qpn);
    at->byte_cnt = htobe32(byte_cnt);
    at->wqe_counter = htobe16(counter);
    at->op_own = opcode << 4;
    mlx5dv_set_cqe_owner(at, owner);
}
";

/// Structures of dv.rs that have no name in the header, by the fields that they are of.
const NAMELESS: [(&str, &str, &str); 3] = [
    ("mlx5dv_qp_sq", "mlx5dv_qp", "sq"),
    ("mlx5dv_qp_bf", "mlx5dv_qp", "bf"),
    ("mlx5dv_obj_qp", "mlx5dv_obj", "qp"),
];

/// The functions that are called, as library.rs of the same folder has them.
const PROTOTYPES: [(&str, &str); 2] = [
    ("mlx5dv_is_supported", "bool (*)(struct ibv_device *)"),
    ("mlx5dv_init_obj", "int (*)(struct mlx5dv_obj *, uint64_t)"),
];

#[derive(Default)]
struct Tables {
    ours: String,
    c: String,
}

impl Tables {
    fn fact(&mut self, name: &str, ours: impl std::fmt::Display, c: &str) {
        writeln!(self.ours, "({name:?}, ({ours}) as i64),").unwrap();
        writeln!(self.c, "{{ {name:?}, (long long)({c}) }},").unwrap();
    }
}

fn number(expr: &Expr) -> usize {
    match expr {
        Expr::Lit(lit) => match &lit.lit {
            Lit::Int(int) => int.base10_parse().expect("layout.rs: a number"),
            _ => panic!("layout.rs: no number"),
        },
        _ => panic!("layout.rs: no number"),
    }
}

/// A file of crates/verbs.
fn parsed(here: &Path, name: &str) -> syn::File {
    let path = here.join("../../crates/verbs/src/mlx5").join(name);
    println!("cargo:rerun-if-changed={}", path.display());
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What dv.rs declares: constants, and structures as C has them.
fn declared(tables: &mut Tables, file: &syn::File) {
    for item in &file.items {
        match item {
            Item::Use(_) => {}
            Item::Const(item) => {
                let name = item.ident.to_string();
                tables.fact(&name, format!("dv::{name}"), &name);
            }
            Item::Struct(item) => {
                let repr = item.attrs.iter().any(|attr| {
                    attr.path().is_ident("repr")
                        && attr.to_token_stream().to_string().contains("(C)")
                });
                let name = item.ident.to_string();
                assert!(repr, "dv.rs: {name} is not repr(C)");
                let nameless = NAMELESS.iter().find(|(n, ..)| *n == name);
                let c = match nameless {
                    Some((_, of, field)) => format!("__typeof__(((struct {of} *)0)->{field})"),
                    None => format!("struct {name}"),
                };
                let ours = format!("dv::{name}");
                tables.fact(
                    &format!("{name}: size"),
                    format!("size_of::<{ours}>()"),
                    &format!("sizeof({c})"),
                );
                tables.fact(
                    &format!("{name}: alignment"),
                    format!("align_of::<{ours}>()"),
                    &format!("_Alignof({c})"),
                );
                for field in &item.fields {
                    let raw = field
                        .ident
                        .as_ref()
                        .expect("dv.rs: a field's name")
                        .to_string();
                    let of_c = raw.trim_start_matches("r#");
                    tables.fact(
                        &format!("{name}.{of_c}: offset"),
                        format!("std::mem::offset_of!({ours}, {raw})"),
                        &format!("offsetof({c}, {of_c})"),
                    );
                    tables.fact(
                        &format!("{name}.{of_c}: size"),
                        format!(
                            "size_of_field(|v: *const {ours}| unsafe {{ &raw const (*v).{raw} }})"
                        ),
                        &format!("sizeof((({c} *)0)->{of_c})"),
                    );
                }
            }
            other => panic!("dv.rs: what is {}?", other.to_token_stream()),
        }
    }
    for (name, prototype) in PROTOTYPES {
        let same = format!("__builtin_types_compatible_p(__typeof__(&{name}), {prototype})");
        tables.fact(&format!("{name}: prototype"), 1, &same);
    }
}

/// Writes what the tests include, and compiles what C has to say.
pub fn write(here: &Path, out: &Path) {
    let file = parsed(here, "layout.rs");
    let mut tables = Tables::default();
    declared(&mut tables, &parsed(here, "dv.rs"));
    for item in &file.items {
        match item {
            Item::Const(item) => {
                let name = item.ident.to_string();
                tables.fact(&name, number(&item.expr), &name);
            }
            Item::Mod(item) => {
                let name = item.ident.to_string();
                let (_, items) = item.content.as_ref().expect("layout.rs: a module's items");
                structure(&mut tables, &name, items);
            }
            _ => panic!("layout.rs: something else than a constant or a structure"),
        }
    }
    let ours = &tables.ours;
    let rust = format!("pub fn mlx5() -> Vec<(&'static str, i64)> {{ vec![\n{ours}] }}\n");
    fs::write(out.join("mlx5_facts.rs"), rust).expect("mlx5_facts.rs");
    let c = &tables.c;
    let probe = out.join("mlx5_probe.c");
    let text = format!(
        "#include <endian.h>\n#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n\
         #include <infiniband/mlx5dv.h>\n\
         struct fact {{ const char *name; long long value; }};\n\
         const struct fact kvxfer_mlx5_facts[] = {{\n{c}{{ 0, 0 }} }};\n{WRITERS}"
    );
    fs::write(&probe, text).expect("mlx5_probe.c");
    cc::Build::new()
        .file(&probe)
        .warnings(false)
        .compile("kvxfer_mlx5_probe");
}

fn structure(tables: &mut Tables, name: &str, items: &[Item]) {
    let mut size = false;
    for item in items {
        let item = match item {
            Item::Use(_) => continue,
            Item::Const(item) => item,
            _ => panic!("layout.rs: something else than a field in {name}"),
        };
        let field = item.ident.to_string().to_lowercase();
        if field == "size" {
            size = true;
            tables.fact(
                &format!("{name}: size"),
                number(&item.expr),
                &format!("sizeof(struct {name})"),
            );
            continue;
        }
        let Expr::Range(range) = &*item.expr else {
            panic!("layout.rs: {name}.{field} is no range");
        };
        let (Some(start), Some(end)) = (&range.start, &range.end) else {
            panic!("layout.rs: {name}.{field} has no two ends");
        };
        let (start, end) = (number(start), number(end));
        tables.fact(
            &format!("{name}.{field}: offset"),
            start,
            &format!("offsetof(struct {name}, {field})"),
        );
        tables.fact(
            &format!("{name}.{field}: size"),
            end - start,
            &format!("sizeof(((struct {name} *)0)->{field})"),
        );
    }
    assert!(size, "layout.rs: {name} has no SIZE");
}
