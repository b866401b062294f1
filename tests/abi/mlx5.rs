//! The layouts of mlx5's queues, as a C compiler says them of `mlx5dv.h`; and what its functions write.

use std::fmt::Write;
use std::fs;
use std::path::Path;

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

#[derive(Default)]
struct Tables {
    ours: String,
    c: String,
}

impl Tables {
    fn fact(&mut self, name: &str, ours: usize, c: &str) {
        writeln!(self.ours, "({name:?}, {ours}),").unwrap();
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

/// Writes what the tests include, and compiles what C has to say.
pub fn write(here: &Path, out: &Path) {
    let path = here.join("../../crates/verbs/src/mlx5/layout.rs");
    println!("cargo:rerun-if-changed={}", path.display());
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut tables = Tables::default();
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
        "#include <endian.h>\n#include <stddef.h>\n#include <stdint.h>\n\
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
