//! The same for the GPU runtimes: HIP's declarations as a C compiler reads the headers, and CUDA's, whose
//! headers are not free to install, as bindgen read cuda.h for the crate cudarc.

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use quote::ToTokens;
use syn::parse::{Parse, ParseStream};
use syn::{Attribute, FnArg, Ident, Item, ReturnType, Signature, Token, Type};

/// What ROCm 5.2's headers do not have, or have with another value (`hipIpcMemLazyEnablePeerAccess` was 0).
const NEWER: [&str; 6] = [
    "hipDeviceMallocUncached",
    "hipIpcMemLazyEnablePeerAccess",
    "hipMemRangeHandleType",
    "hipMemRangeHandleTypeDmaBufFd",
    "hipMemGetHandleForAddressRange",
    "hsa_amd_portable_export_dmabuf",
];

/// Where cudarc has constants that are plain numbers here; the others it has by their names.
const ENUMS: [(&str, &str); 4] = [
    ("CU_MEMORYTYPE_", "CUmemorytype::"),
    ("CU_STREAM_", "CUstream_flags::"),
    ("CU_EVENT_", "CUevent_flags::"),
    ("CU_IPC_MEM_", "CUipcMem_flags::"),
];

/// Three tables of facts: ours, and what C and bindgen say.
#[derive(Default)]
struct Tables {
    ours: String,
    theirs: String,
}

impl Tables {
    fn fact(&mut self, name: &str, ours: &str, theirs: &str, of_c: bool) {
        writeln!(self.ours, "({name:?}, ({ours}) as i64),").unwrap();
        match of_c {
            true => writeln!(self.theirs, "{{ {name:?}, (long long)({theirs}) }},").unwrap(),
            false => writeln!(self.theirs, "({name:?}, ({theirs}) as i64),").unwrap(),
        }
    }
}

fn text(tokens: &impl ToTokens) -> String {
    tokens.to_token_stream().to_string()
}

fn has(attrs: &[Attribute], repr: &str) -> bool {
    let mut reprs = attrs.iter().filter(|a| a.path().is_ident("repr"));
    reprs.any(|a| text(a).contains(repr))
}

/// What a file declares of types and constants. `module` is where it stands in the tests.
fn types(tables: &mut Tables, file: &syn::File, module: &str, of_c: bool) {
    let theirs = |name: &str| match of_c {
        true => name.to_owned(),
        false => format!("cudarc::driver::sys::{name}"),
    };
    let size = |name: &str| match of_c {
        true => format!("sizeof({name})"),
        false => format!("size_of::<{}>()", theirs(name)),
    };
    for item in &file.items {
        match item {
            Item::Use(_) => {}
            Item::Type(item) => {
                let name = item.ident.to_string();
                let ours = format!("size_of::<{module}::{name}>()");
                tables.fact(&format!("{name}: size"), &ours, &size(&name), of_c);
            }
            Item::Const(item) => {
                let name = item.ident.to_string();
                if NEWER.contains(&name.as_str()) {
                    continue;
                }
                let ty = text(&*item.ty);
                let newtype = !["c_uint", "usize"].contains(&ty.as_str());
                let field = if newtype { ".0" } else { "" };
                let in_enum = ENUMS.iter().find(|(begin, _)| name.starts_with(begin));
                let theirs = match (of_c, newtype, in_enum) {
                    (true, ..) => name.clone(),
                    (false, true, _) => theirs(&format!("{ty}::{name}")),
                    (false, false, Some((_, of))) => theirs(&format!("{of}{name}")),
                    (false, false, None) if name == "CU_LAUNCH_PARAM_END" => {
                        theirs("CU_LAUNCH_PARAM_END_AS_INT")
                    }
                    (false, false, None) if name.starts_with("CU_LAUNCH_") => {
                        theirs(&format!("{name}_AS_INT"))
                    }
                    (false, false, None) => theirs(&name),
                };
                tables.fact(&name, &format!("{module}::{name}{field}"), &theirs, of_c);
            }
            Item::Struct(item) => {
                let name = item.ident.to_string();
                if NEWER.contains(&name.as_str()) {
                    continue;
                }
                let ours = format!("{module}::{name}");
                let sized = format!("size_of::<{ours}>()");
                tables.fact(&format!("{name}: size"), &sized, &size(&name), of_c);
                if has(&item.attrs, "transparent") {
                    continue;
                }
                assert!(has(&item.attrs, "C"), "{name} is not repr(C)");
                let align = match of_c {
                    true => format!("_Alignof({name})"),
                    false => format!("align_of::<{}>()", theirs(&name)),
                };
                let aligned = format!("align_of::<{ours}>()");
                tables.fact(&format!("{name}: alignment"), &aligned, &align, of_c);
                for field in &item.fields {
                    let field = field.ident.as_ref().expect("a field's name").to_string();
                    let offset = match of_c {
                        true => format!("offsetof({name}, {field})"),
                        false => format!("std::mem::offset_of!({}, {field})", theirs(&name)),
                    };
                    let at = format!("std::mem::offset_of!({ours}, {field})");
                    tables.fact(&format!("{name}.{field}: offset"), &at, &offset, of_c);
                    if of_c {
                        let bytes = format!(
                            "crate::size_of_field(|v: *const {ours}| unsafe {{ &raw const (*v).{field} }})"
                        );
                        let theirs = format!("sizeof((({name} *)0)->{field})");
                        tables.fact(&format!("{name}.{field}: size"), &bytes, &theirs, true);
                    }
                }
            }
            other => panic!("what is {}?", text(other)),
        }
    }
}

/// What `functions!` is given.
struct Table {
    required: Vec<Signature>,
    optional: Vec<Signature>,
}

impl Parse for Table {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        input.call(Attribute::parse_outer)?;
        let _: Ident = input.parse()?;
        let list = |kind: &str| -> syn::Result<Vec<Signature>> {
            let word: Ident = input.parse()?;
            if word != kind {
                return Err(syn::Error::new(word.span(), format!("not {kind}")));
            }
            let (list, mut all);
            syn::braced!(list in input);
            all = Vec::new();
            while !list.is_empty() {
                all.push(list.parse()?);
                list.parse::<Token![;]>()?;
            }
            Ok(all)
        };
        Ok(Self {
            required: list("required")?,
            optional: list("optional")?,
        })
    }
}

/// The functions that a file declares.
fn functions(file: &syn::File) -> Vec<Signature> {
    let mut all = Vec::new();
    for item in &file.items {
        if let Item::Macro(item) = item {
            assert!(
                item.mac.path.is_ident("functions"),
                "what is {}?",
                text(item)
            );
            let table: Table = item.mac.parse_body().expect("functions!");
            all.extend(table.required);
            all.extend(table.optional);
        }
    }
    assert!(!all.is_empty(), "no functions!");
    all
}

/// A type as C writes it; the types of HIP have their names there.
fn in_c(ty: &Type) -> String {
    if let Type::Ptr(ptr) = ty {
        let to = in_c(&ptr.elem);
        return match ptr.const_token {
            Some(_) => format!("const {to} *"),
            None => format!("{to} *"),
        };
    }
    let name = text(ty);
    match name.as_str() {
        "c_int" => "int".to_owned(),
        "c_uint" => "unsigned int".to_owned(),
        "c_char" => "char".to_owned(),
        "c_void" => "void".to_owned(),
        "f32" => "float".to_owned(),
        "u64" => "uint64_t".to_owned(),
        _ => name,
    }
}

/// A type as it stands in cudarc: what is not C's own has its name there.
fn in_cudarc(ty: &Type) -> String {
    if let Type::Ptr(ptr) = ty {
        let to = in_cudarc(&ptr.elem);
        return match ptr.const_token {
            Some(_) => format!("*const {to}"),
            None => format!("*mut {to}"),
        };
    }
    let name = text(ty);
    match name.as_str() {
        "size_t" => "usize".to_owned(),
        "f32" | "u8" => name,
        _ if name.starts_with("c_") => format!("libc::{name}"),
        _ => format!("cudarc::driver::sys::{name}"),
    }
}

fn inputs(signature: &Signature) -> impl Iterator<Item = &Type> {
    signature.inputs.iter().map(|arg| match arg {
        FnArg::Typed(arg) => &*arg.ty,
        FnArg::Receiver(_) => panic!("self"),
    })
}

fn joined(list: impl Iterator<Item = String>, none: &str) -> String {
    let list: Vec<_> = list.collect();
    match list.is_empty() {
        true => none.to_owned(),
        false => list.join(", "),
    }
}

/// Writes what the tests include, and compiles what C has to say.
pub fn write(here: &Path, out: &Path) {
    let sys = here.join("../../crates/hipmem/src/gpu/sys");
    let read = |name: &str| -> syn::File {
        let path = sys.join(name);
        println!("cargo:rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let mut hip = Tables::default();
    types(&mut hip, &read("hip_types.rs"), "hip_types", true);
    let mut c_functions = functions(&read("hip.rs"));
    c_functions.extend(functions(&read("hsa.rs")));
    for signature in c_functions {
        let name = signature.ident.to_string();
        if NEWER.contains(&name.as_str()) {
            continue;
        }
        let args = joined(inputs(&signature).map(in_c), "void");
        let ret = match &signature.output {
            ReturnType::Default => "void".to_owned(),
            ReturnType::Type(_, ty) => in_c(ty),
        };
        let same = format!("__builtin_types_compatible_p(__typeof__(&{name}), {ret} (*)({args}))");
        hip.fact(&format!("{name}: prototype"), "1", &same, true);
    }
    let mut cuda = Tables::default();
    types(&mut cuda, &read("cuda_types.rs"), "cuda_types", false);
    let mut prototypes = String::new();
    for signature in functions(&read("cuda.rs")) {
        let name = signature.ident.to_string();
        let args = joined(inputs(&signature).map(in_cudarc), "");
        let ReturnType::Type(_, ret) = &signature.output else {
            panic!("{name} returns nothing");
        };
        let ret = in_cudarc(ret);
        writeln!(
            prototypes,
            "const _: unsafe fn({args}) -> {ret} = cudarc::driver::sys::{name};"
        )
        .unwrap();
    }
    let rust = format!(
        "pub fn hip() -> Vec<(&'static str, i64)> {{ vec![\n{}] }}\n\
         pub fn cuda() -> Vec<(&'static str, i64)> {{ vec![\n{}] }}\n\
         pub fn cudarc() -> Vec<(&'static str, i64)> {{ vec![\n{}] }}\n{prototypes}",
        hip.ours, cuda.ours, cuda.theirs
    );
    fs::write(out.join("gpu_facts.rs"), rust).expect("gpu_facts.rs");
    let probe = out.join("hip_probe.c");
    let text = format!(
        "#define __HIP_PLATFORM_AMD__ 1\n\
         #include <stddef.h>\n#include <stdint.h>\n\
         #include <hip/hip_runtime_api.h>\n#include <hsa/hsa.h>\n\
         struct fact {{ const char *name; long long value; }};\n\
         const struct fact kvxfer_hip_facts[] = {{\n{}{{ 0, 0 }} }};\n",
        hip.theirs
    );
    fs::write(&probe, text).expect("hip_probe.c");
    cc::Build::new()
        .file(&probe)
        .include(
            env::var_os("HIP_PATH")
                .unwrap_or_else(|| "/usr".into())
                .to_string_lossy()
                .into_owned()
                + "/include",
        )
        .warnings(false)
        .compile("kvxfer_hip_probe");
}
