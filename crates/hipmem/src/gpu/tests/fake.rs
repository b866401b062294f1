//! Runtimes of C that do as little as they can, built by the compiler that links Rust programs.

use std::ffi::c_int;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use super::super::sys::Library;

/// Two devices, with 64 KiB of memory at 0x200000 (of the first), 0x300000 (of the second), at 0x500000 such
/// as no handle names, and of the host at 0x900000.
pub(super) const CUDA: &str = r#"
int depth, pushes, retained, last, peers, refuse_export, exported;
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strcpy(s, "fake"); return 0; }
int cuDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:1%d:00.0", d); return 0; }
int cuDeviceGetUuid(char *u, int d) { memset(u, d + 1, 16); return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = 1 << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 118 ? 100 : 1; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int e, const char **s) { *s = 0; return 1; }
int cuDeviceCanAccessPeer(int *can, int a, int b) { *can = a < b; return 0; }
int cuCtxEnablePeerAccess(void *c, unsigned f) { return peers++ ? 704 : 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)(0x1000L + d); retained++; return 0; }
int cuCtxPushCurrent_v2(void *c) { last = (long)c; depth++; pushes++; return 0; }
int cuCtxPopCurrent_v2(void **c) { depth--; return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = 5; *t = 6; return depth == 1 || depth == 2 ? 0 : 201; }
int cuMemAlloc_v2(u64 *p, size_t n) { *p = 0x400000; return n > 1 << 30 ? 2 : 0; }
int cuPointerGetAttribute(void *v, int a, u64 p) {
    if (p < 0x200000) return 1;
    if (a == 2 || a == 9) *(int *)v = a == 2 ? (p >= 0x900000 ? 1 : 2) : p >> 20 == 3;
    else *(char *)v = a == 10 && p >> 20 != 5;
    return 0;
}
int cuMemGetAddressRange_v2(u64 *b, size_t *n, u64 p) { *b = p & ~0xffffULL; *n = 0x10000; return 0; }
int cuIpcGetMemHandle(char *h, u64 p) { exported = p; return refuse_export; }
int cuModuleLoadDataEx(void **m, const char *image, unsigned n, int *names, void **values) {
    snprintf(values[0], (size_t)values[1], "ptxas: line 1 of %zu bytes\n", strlen(image));
    return n == 2 && names[0] == 5 && names[1] == 6 ? 218 : 1;
}
"#;

pub(super) const CUDA_DMA_BUF: &str = r#"
int from, bytes, refuse;
int cuMemGetHandleForAddressRange(int *fd, u64 p, size_t n, int kind, u64 flags) {
    from = p; bytes = n; *fd = dup(2);
    return kind == 1 && !flags ? refuse : 1;
}
"#;

pub(super) const CUDA_PINS: &str = r#"
int pins, pinned, keep;
int cuMemHostRegister_v2(void *p, size_t n, unsigned flags) { pins++; pinned += n; return 0; }
int cuMemHostUnregister(void *p) { pins -= !keep; return keep ? 1 : 0; }
"#;

/// Two devices, with memory as the other fake has it.
pub(super) const HIP: &str = r#"
int current, sets, last_error, device_type = 1, host_type, allocated, old_flag, open_;
static int is(int e) { last_error = e ? e : last_error; return e; }
struct attributes { int type, device; void *d, *h; int managed; unsigned flags; };
struct handle { char bytes[64]; };
const char *hipGetErrorName(int e) { return "hipErrorFake"; }
const char *hipGetErrorString(int e) { return "hipErrorFake"; }
int hipGetLastError(void) { int e = last_error; last_error = 0; return e; }
int hipGetDeviceCount(int *n) { *n = 2; return 0; }
int hipGetDevice(int *d) { *d = current; return 0; }
int hipSetDevice(int d) { current = d; sets++; return 0; }
int hipDeviceGet(int *d, int i) { *d = i; return 0; }
int hipDeviceGetName(char *s, int n, int d) { strcpy(s, "fake"); return 0; }
int hipDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:1%d:00.0", d); return 0; }
int hipDeviceTotalMem(size_t *n, int d) { *n = 1 << 30; return 0; }
int hipMalloc(void **p, size_t n) {
    if (n > 1 << 30) return is(2);
    allocated++;
    *p = (void *)(current ? 0x300000L : 0x200000L);
    return 0;
}
int hipFree(void *p) { allocated--; return 0; }
int hipPointerGetAttributes(struct attributes *a, const void *p) {
    a->type = (long)p >= 0x900000 ? host_type : device_type;
    a->device = (long)p >> 20 == 3;
    return 0;
}
int hipMemGetAddressRange(void **b, size_t *n, void *p) {
    *b = (void *)((long)p & ~0xffffL);
    *n = 0x10000;
    return 0;
}
int hipIpcOpenMemHandle(void **p, struct handle h, unsigned flags) {
    if (flags == old_flag) return is(1);
    open_++;
    *p = (void *)0x200000;
    return 0;
}
int hipIpcCloseMemHandle(void *p) { open_--; return 0; }
"#;

pub(super) const HIP_DMA_BUF: &str = r#"
int from, bytes;
int hipMemGetHandleForAddressRange(int *fd, void *p, size_t n, int kind, u64 flags) {
    from = (long)p; bytes = n; *fd = dup(2);
    return kind == 1 && !flags ? 0 : is(1);
}
"#;

pub(super) const HSA: &str = r#"
int initialised, status;
int hsa_init(void) { initialised++; return 0; }
int hsa_status_string(int s, const char **words) { *words = "fake words"; return 0; }
int hsa_amd_portable_export_dmabuf(const void *p, size_t n, int *fd, u64 *offset) {
    if (status) return status;
    *fd = dup(2); *offset = 0x77;
    return 0;
}
"#;

/// A library that is loaded. Its file goes with the value.
pub(super) struct Fake {
    path: PathBuf,
    library: Library,
}

impl Fake {
    /// From C that has some of the functions; the other ones of `required` do nothing and say 0.
    pub(super) fn new(source: &str, required: &[&str]) -> Self {
        Self::build(source, required, None)
    }

    /// The usual one, with a function replaced by this.
    pub(super) fn but(base: &str, function: &str, required: &[&str]) -> Self {
        let (head, _) = function.split_once('(').unwrap();
        let begins = format!("{head}(");
        let kept: Vec<_> = base
            .lines()
            .filter(|line| !line.starts_with(&begins))
            .collect();
        assert!(
            kept.len() < base.lines().count() || !base.contains(&begins),
            "{head}"
        );
        Self::build(
            &format!("{}\n{function}\n", kept.join("\n")),
            required,
            None,
        )
    }

    /// The same, and without one of them.
    pub(super) fn without(source: &str, required: &[&str], symbol: &str) -> Self {
        Self::build(source, required, Some(symbol))
    }

    fn build(source: &str, required: &[&str], without: Option<&str>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("kvxfer-gpu-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let defined = |name: &str| source.contains(&format!("{name}("));
        let mut text = "#include <stdio.h>\n#include <string.h>\n#include <unistd.h>\n\
                        typedef unsigned long long u64;\n"
            .to_owned();
        text.push_str(source);
        for name in required.iter().filter(|name| !defined(name)) {
            writeln!(text, "int {name}(void) {{ return 0; }}").unwrap();
        }
        if let Some(name) = without {
            text = text.replace(&format!("{name}("), &format!("gone_{name}("));
        }
        let (c, path) = (folder.join("fake.c"), folder.join("libfake.so.1"));
        std::fs::write(&c, text).unwrap();
        let ran = Command::new("cc")
            .args(["-shared", "-fPIC", "-w", "-O1", "-o"])
            .arg(&path)
            .arg(&c)
            .output();
        let ran = ran.unwrap();
        let words = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "cc: {words}");
        let library = Library::first(&[path.as_os_str()]).unwrap();
        Self { path, library }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn place(&self, name: &str) -> &AtomicI32 {
        let name = if name == "open" { "open_" } else { name };
        let symbol = self
            .library
            .symbol(name)
            .unwrap_or_else(|| panic!("no {name}"));
        // SAFETY: it is an `int` of the library, which is never closed.
        unsafe { symbol.cast::<AtomicI32>().as_ref() }
    }

    /// A number of the library's.
    pub(super) fn number(&self, name: &str) -> c_int {
        self.place(name).load(Ordering::SeqCst)
    }

    pub(super) fn set(&self, name: &str, value: c_int) {
        self.place(name).store(value, Ordering::SeqCst);
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(folder) = self.path.parent() {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}
