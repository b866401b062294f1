//! Reads our declarations of C and writes the same table of facts three times: as Rust says it of
//! ours, as a C compiler says it of the headers, and as Rust says it of what bindgen made for
//! rdma-sys. Nothing is listed by hand: what is declared is compared, and what cannot be understood
//! here ends the build. The GPU runtimes' are in gpu.rs, mlx5's in mlx5.rs.

mod gpu;
mod mlx5;

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use quote::ToTokens;
use syn::parse::{Parse, ParseStream};
use syn::{Field, FnArg, Ident, Item, LitStr, ReturnType, Signature, Token, Type};

/// Types that have no name in C, or another kind than `struct`; and their names in rdma-sys.
const NAMES: [(&str, &str, &str); 8] = [
    ("ibv_gid", "union ibv_gid", "ibv_gid"),
    (
        "ibv_async_event_element",
        "__typeof__(((struct ibv_async_event *)0)->element)",
        "ibv_async_event_element_t",
    ),
    (
        "ibv_send_wr_wr",
        "__typeof__(((struct ibv_send_wr *)0)->wr)",
        "wr_t",
    ),
    (
        "ibv_send_wr_rdma",
        "__typeof__(((struct ibv_send_wr *)0)->wr.rdma)",
        "rdma_t",
    ),
    (
        "ibv_send_wr_atomic",
        "__typeof__(((struct ibv_send_wr *)0)->wr.atomic)",
        "atomic_t",
    ),
    (
        "ibv_send_wr_ud",
        "__typeof__(((struct ibv_send_wr *)0)->wr.ud)",
        "ud_t",
    ),
    (
        "ibv_send_wr_xrc",
        "__typeof__(((struct ibv_send_wr *)0)->qp_type.xrc)",
        "xrc_t",
    ),
    (
        "ibv_send_wr_bind_mw",
        "__typeof__(((struct ibv_send_wr *)0)->bind_mw)",
        "bind_mw_t",
    ),
];

/// Fields that rdma-sys calls something else.
const FIELDS: [(&str, &str, &str); 4] = [
    ("ibv_wc", "imm_data", "imm_data_invalidated_rkey_union"),
    ("ibv_send_wr", "imm_data", "imm_data_invalidated_rkey_union"),
    ("ibv_send_wr", "bind_mw", "bind_mw_tso_union"),
    ("verbs_context", "priv", "priv_"),
];

/// Enumerations whose values bindgen made constants of the crate, and the one that it made a Rust
/// enumeration. The others are modules.
const CRATE_ENUMS: [&str; 2] = ["ibv_gid_type", "ibv_fork_status"];
const RUST_ENUM: &str = "ibv_event_type";

/// Where rdma-sys has plain constants, by how they begin. An empty place: it has them not.
const FLAGS: [(&str, &str); 7] = [
    ("IBV_ACCESS_OPTIONAL_RANGE", ""),
    ("IBV_ACCESS_", "ibv_access_flags"),
    ("IBV_QP_", "ibv_qp_attr_mask"),
    ("IBV_SEND_", "ibv_send_flags"),
    ("IBV_WC_", "ibv_wc_flags"),
    ("IBV_LINK_LAYER_", ""),
    ("IBV_QPF_", ""),
];

/// The structure that grows at its front: its fields are counted from this one back.
const FROM_THE_END: (&str, &str) = ("verbs_context", "context");

#[derive(Default)]
struct Tables {
    ours: String,
    c: String,
    rdma: String,
    enums: BTreeSet<String>,
}

impl Tables {
    /// One fact: its name, and how it is asked in Rust, in C, and in Rust of rdma-sys.
    fn fact(&mut self, name: &str, ours: &str, c: &str, rdma: Option<&str>) {
        writeln!(self.ours, "({name:?}, ({ours}) as i64),").unwrap();
        writeln!(self.c, "{{ {name:?}, (long long)({c}) }},").unwrap();
        if let Some(rdma) = rdma {
            writeln!(self.rdma, "({name:?}, ({rdma}) as i64),").unwrap();
        }
    }

    fn enumerations(&mut self, file: &syn::File) {
        for item in &file.items {
            match item {
                Item::Use(_) => {}
                Item::Struct(item) => {
                    let name = item.ident.to_string();
                    let fields: Vec<_> = item.fields.iter().collect();
                    let [
                        Field {
                            ty, ident: None, ..
                        },
                    ] = fields.as_slice()
                    else {
                        panic!("enums.rs: {name} is no newtype");
                    };
                    let int = text(ty);
                    let rdma = match name.as_str() {
                        RUST_ENUM => format!("rdma_sys::{name}"),
                        n if CRATE_ENUMS.contains(&n) => format!("rdma_sys::{name}"),
                        _ => format!("rdma_sys::{name}::Type"),
                    };
                    self.fact(
                        &format!("enum {name}: size"),
                        &format!("size_of::<enums::{name}>()"),
                        &format!("sizeof(enum {name})"),
                        Some(&format!("size_of::<{rdma}>()")),
                    );
                    self.fact(
                        &format!("enum {name}: signed"),
                        &format!("libc::{int}::MIN != 0"),
                        &format!("(enum {name})-1 < 0"),
                        None,
                    );
                    self.enums.insert(name);
                }
                Item::Impl(item) => {
                    let of = text(&item.self_ty);
                    for part in &item.items {
                        let syn::ImplItem::Const(value) = part else {
                            panic!("enums.rs: {} is no constant", text(part));
                        };
                        let name = value.ident.to_string();
                        let rdma = match of.as_str() {
                            n if CRATE_ENUMS.contains(&n) => format!("rdma_sys::{name}"),
                            _ => format!("rdma_sys::{of}::{name}"),
                        };
                        self.fact(&name, &format!("enums::{of}::{name}.0"), &name, Some(&rdma));
                    }
                }
                Item::Const(item) => {
                    let name = item.ident.to_string();
                    let place = FLAGS.iter().find(|(begin, _)| name.starts_with(begin));
                    let Some((_, place)) = place else {
                        panic!("enums.rs: say in FLAGS where rdma-sys has {name}");
                    };
                    let rdma = format!("rdma_sys::{place}::{name}.0");
                    let rdma = (!place.is_empty()).then_some(rdma.as_str());
                    self.fact(&name, &format!("enums::{name}"), &name, rdma);
                }
                other => panic!("enums.rs: what is {}?", text(other)),
            }
        }
    }

    fn types(&mut self, file: &syn::File) {
        for item in &file.items {
            match item {
                // An alias has no layout of its own.
                Item::Use(_) | Item::Type(_) => {}
                Item::Struct(item) => {
                    self.layout(&item.ident, &item.attrs, item.fields.iter());
                }
                Item::Union(item) => {
                    self.layout(&item.ident, &item.attrs, item.fields.named.iter());
                }
                other => panic!("types.rs: what is {}?", text(other)),
            }
        }
    }

    fn layout<'a>(
        &mut self,
        name: &Ident,
        attrs: &[syn::Attribute],
        fields: impl Iterator<Item = &'a Field>,
    ) {
        let name = name.to_string();
        let repr = attrs.iter().find(|a| a.path().is_ident("repr"));
        let repr = repr.map(text).unwrap_or_default();
        assert!(repr.contains('C'), "types.rs: {name} is not repr(C)");
        let named = NAMES.iter().find(|(n, ..)| *n == name);
        let c = named.map_or(format!("struct {name}"), |(_, c, _)| (*c).to_owned());
        let rdma = format!("rdma_sys::{}", named.map_or(name.as_str(), |(.., r)| r));
        let ours = format!("types::{name}");
        let base = (name == FROM_THE_END.0).then_some(FROM_THE_END.1);
        let size = |of: &str, offset: &str, ty: &str| match base {
            Some(base) => format!("{of} - {offset}({ty}, {base})"),
            None => of.to_owned(),
        };
        self.fact(
            &format!("{name}: size"),
            &size(&format!("size_of::<{ours}>()"), "offset_of!", &ours),
            &size(&format!("sizeof({c})"), "offsetof", &c),
            Some(&size(&format!("size_of::<{rdma}>()"), "offset_of!", &rdma)),
        );
        self.fact(
            &format!("{name}: alignment"),
            &format!("align_of::<{ours}>()"),
            &format!("_Alignof({c})"),
            Some(&format!("align_of::<{rdma}>()")),
        );
        for Field { ident, ty, .. } in fields {
            let Some(ident) = ident else {
                panic!("types.rs: a field of {name} has no name");
            };
            let raw = ident.to_string();
            let field = raw.trim_start_matches("r#");
            let other = FIELDS.iter().find(|(n, f, _)| *n == name && *f == field);
            let other = other.map_or(field, |(.., r)| r);
            let place = |offset: &str, ty: &str, field: &str| match base {
                Some(base) => format!("{offset}({ty}, {base}) - {offset}({ty}, {field})"),
                None => format!("{offset}({ty}, {field})"),
            };
            self.fact(
                &format!("{name}.{field}: offset"),
                &place("offset_of!", &ours, &raw),
                &place("offsetof", &c, field),
                Some(&place("offset_of!", &rdma, other)),
            );
            self.fact(
                &format!("{name}.{field}: size"),
                &format!("size_of_field(|v: *const {ours}| unsafe {{ &raw const (*v).{raw} }})"),
                &format!("sizeof((({c} *)0)->{field})"),
                Some(&format!(
                    "size_of_field(|v: *const {rdma}| unsafe {{ &raw const (*v).{other} }})"
                )),
            );
            if let Some(int) = integer(ty) {
                self.fact(
                    &format!("{name}.{field}: signed"),
                    &int,
                    &format!("(__typeof__((({c} *)0)->{field}))-1 < 0"),
                    None,
                );
            }
            if let Some(pointer) = function_pointer(ty) {
                let ty = prototype(
                    pointer.inputs.iter().map(|a| &a.ty),
                    &pointer.output,
                    &self.enums,
                );
                self.prototype(
                    &format!("{name}.{field}"),
                    &format!("((({c} *)0)->{field})"),
                    &ty,
                );
            }
        }
    }

    fn functions(&mut self, file: &syn::File) {
        let mut all = String::new();
        let mut found = false;
        for item in &file.items {
            let Item::Macro(item) = item else { continue };
            if item.ident.is_some() {
                continue;
            }
            assert!(
                item.mac.path.is_ident("functions"),
                "functions.rs: what is {}?",
                text(item)
            );
            found = true;
            let Prototypes(list) = item.mac.parse_body().expect("functions.rs: functions!");
            for (version, signature) in &list {
                let name = signature.ident.to_string();
                let inputs = signature.inputs.iter().map(|arg| match arg {
                    FnArg::Typed(arg) => &*arg.ty,
                    FnArg::Receiver(_) => panic!("functions.rs: self in {name}"),
                });
                let ty = prototype(inputs, &signature.output, &self.enums);
                self.prototype(&name, &format!("&{name}"), &ty);
                writeln!(all, "({name:?}, {:?}),", version.value()).unwrap();
            }
        }
        assert!(found, "functions.rs: no functions!");
        write!(
            self.rdma,
            "]\n}}\npub const FUNCTIONS: &[(&str, &str)] = &[\n{all}];\n"
        )
        .unwrap();
    }

    /// That what C calls `what` is of type `ty`. C has two 64-bit integers.
    fn prototype(&mut self, name: &str, what: &str, ty: &str) {
        let same = |int: &str| {
            let ty = ty.replace("U64", int);
            format!("__builtin_types_compatible_p(__typeof__({what}), {ty})")
        };
        let c = format!("{} || {}", same("uint64_t"), same("__u64"));
        self.fact(&format!("{name}: prototype"), "1", &c, None);
    }
}

/// What `functions!` is given.
struct Prototypes(Vec<(LitStr, Signature)>);

impl Parse for Prototypes {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        let mut all = Vec::new();
        for kind in ["required", "optional"] {
            let word: Ident = input.parse()?;
            if word != kind {
                return Err(syn::Error::new(word.span(), format!("not {kind}")));
            }
            let list;
            syn::braced!(list in input);
            while !list.is_empty() {
                all.push((list.parse()?, list.parse()?));
                list.parse::<Token![;]>()?;
            }
        }
        Ok(Self(all))
    }
}

fn text(tokens: &impl ToTokens) -> String {
    tokens.to_token_stream().to_string()
}

/// How Rust says whether an integer type has a sign; `None` for what is no integer.
fn integer(ty: &Type) -> Option<String> {
    let ty = text(ty);
    match ty.as_str() {
        "u8" | "u16" | "u32" | "u64" => Some(format!("{ty}::MIN != 0")),
        "c_int" | "c_uint" | "size_t" => Some(format!("libc::{ty}::MIN != 0")),
        // The integer in the kernel's table, which has no sign.
        "ibv_gid_type" => Some("false".to_owned()),
        // An enumeration's sign is a fact of its own.
        _ => None,
    }
}

/// The function in an `Option<unsafe extern "C" fn(…)>`.
fn function_pointer(ty: &Type) -> Option<&syn::TypeBareFn> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last()?;
    let syn::PathArguments::AngleBracketed(args) = &last.arguments else {
        return None;
    };
    match args.args.first()? {
        syn::GenericArgument::Type(Type::BareFn(f)) => Some(f),
        _ => None,
    }
}

fn prototype<'a>(
    inputs: impl Iterator<Item = &'a Type>,
    output: &ReturnType,
    enums: &BTreeSet<String>,
) -> String {
    let inputs: Vec<_> = inputs.map(|ty| in_c(ty, enums)).collect();
    let inputs = match inputs.is_empty() {
        true => "void".to_owned(),
        false => inputs.join(", "),
    };
    let output = match output {
        ReturnType::Default => "void".to_owned(),
        ReturnType::Type(_, ty) => in_c(ty, enums),
    };
    format!("{output} (*)({inputs})")
}

/// A type as C writes it.
fn in_c(ty: &Type, enums: &BTreeSet<String>) -> String {
    if let Type::Ptr(ptr) = ty {
        let to = in_c(&ptr.elem, enums);
        return match ptr.const_token {
            Some(_) => format!("const {to} *"),
            None => format!("{to} *"),
        };
    }
    let name = text(ty);
    let plain = match name.as_str() {
        "c_int" => "int",
        "c_uint" => "unsigned int",
        "c_char" => "char",
        "c_void" => "void",
        "size_t" => "size_t",
        "ssize_t" => "ssize_t",
        "u8" => "uint8_t",
        "u16" => "uint16_t",
        "u32" => "uint32_t",
        "u64" => "U64",
        _ => {
            if let Some((_, c, _)) = NAMES.iter().find(|(n, ..)| *n == name) {
                return (*c).to_owned();
            }
            let known = ["ibv_", "_compat_ibv_"].iter().any(|p| name.starts_with(p));
            assert!(known, "how does C write {name}?");
            let kind = if enums.contains(&name) {
                "enum"
            } else {
                "struct"
            };
            return format!("{kind} {name}");
        }
    };
    plain.to_owned()
}

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where"));
    let sys = here.join("../../crates/verbs/src/sys");
    let read = |name: &str| -> syn::File {
        let path: &Path = &sys.join(name);
        println!("cargo:rerun-if-changed={}", path.display());
        let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let mut tables = Tables::default();
    tables.enumerations(&read("enums.rs"));
    tables.types(&read("types.rs"));
    tables.functions(&read("functions.rs"));

    let ours = &tables.ours;
    let rdma = &tables.rdma;
    let rust = format!(
        "pub fn ours() -> Vec<(&'static str, i64)> {{ vec![\n{ours}] }}\n\
         pub fn rdma() -> Vec<(&'static str, i64)> {{ vec![\n{rdma}"
    );
    fs::write(out.join("facts.rs"), rust).expect("facts.rs");
    let c = &tables.c;
    let probe = out.join("probe.c");
    let text = format!(
        "#include <infiniband/verbs.h>\n\
         struct fact {{ const char *name; long long value; }};\n\
         const struct fact kvxfer_abi_facts[] = {{\n{c}{{ 0, 0 }} }};\n"
    );
    fs::write(&probe, text).expect("probe.c");
    cc::Build::new()
        .file(&probe)
        .warnings(false)
        .compile("kvxfer_abi_probe");
    gpu::write(&here, &out);
    mlx5::write(&here, &out);
}
