//! Code that is loaded, kernels that run, and what is not code.

use std::process::Command;

use kvxfer_hipmem::gpu::{Event, GpuFault, GpuMemory, Module, RuntimeKind, Stream};

use crate::{Outcome, fault, gpu, soon};

/// Adds a number to each of `n` words.
const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry add(.param .align 8 .b8 args[16])
{
    .reg .pred %p<2>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [args];
    ld.param.u32 %r1, [args+8];
    ld.param.u32 %r2, [args+12];
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.u32 %r6, %r3, %r4, %r5;
    setp.ge.u32 %p1, %r6, %r1;
    @%p1 ret;
    cvta.to.global.u64 %rd2, %rd1;
    mul.wide.u32 %rd3, %r6, 4;
    add.u64 %rd4, %rd2, %rd3;
    ld.global.u32 %r7, [%rd4];
    add.u32 %r7, %r7, %r2;
    st.global.u32 [%rd4], %r7;
    ret;
}
";

/// The same for the stand-in, whose kernels do the work of all threads.
const C: &str = "
#include <stdint.h>
struct args { uint32_t *words; uint32_t n, number; };
void add(const void *given, uint32_t grid, uint32_t block) {
    const struct args *a = given;
    for (uint32_t i = 0; i < grid * block && i < a->n; i++)
        a->words[i] += a->number;
}
";

/// The same for AMD, without any header.
const HIP: &str = "
struct args { unsigned *words; unsigned n, number; };
extern \"C\" __attribute__((global)) void add(args a) {
    unsigned i = __builtin_amdgcn_workgroup_id_x() * __builtin_amdgcn_workgroup_size_x()
               + __builtin_amdgcn_workitem_id_x();
    if (i < a.n) a.words[i] += a.number;
}
";

fn compile(compiler: &str, name: &str, source: &str, args: &[&str]) -> Vec<u8> {
    let own = format!(
        "kvxfer-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let folder = std::env::temp_dir().join(own);
    std::fs::create_dir_all(&folder).unwrap();
    let (from, to) = (folder.join(name), folder.join("out"));
    std::fs::write(&from, source).unwrap();
    let ran = Command::new(compiler)
        .args(args)
        .arg(&from)
        .arg("-o")
        .arg(&to)
        .output();
    let ran = ran.unwrap_or_else(|e| panic!("{compiler}: {e}"));
    let words = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{compiler}: {words}");
    let bytes = std::fs::read(&to).unwrap();
    std::fs::remove_dir_all(&folder).ok();
    bytes
}

fn code() -> Vec<u8> {
    let gpu = gpu();
    match gpu.runtime() {
        RuntimeKind::Cuda => PTX.as_bytes().to_vec(),
        RuntimeKind::Host => compile("cc", "add.c", C, &["-shared", "-fPIC", "-O1"]),
        RuntimeKind::Hip => {
            let arch = format!("--offload-arch={}", gpu.info().arch);
            let args = [
                "-x",
                "hip",
                "--cuda-device-only",
                "--no-gpu-bundle-output",
                &arch,
                "-nogpuinc",
                "-nogpulib",
                "-O2",
            ];
            compile("clang-22", "add.hip", HIP, &args)
        }
    }
}

fn args(words: u64, n: u32, number: u32) -> Vec<u8> {
    let (n, number) = (n.to_le_bytes(), number.to_le_bytes());
    [&words.to_le_bytes()[..], &n, &number].concat()
}

#[test]
fn a_kernel_runs_after_what_is_before_it_on_its_stream() -> Outcome {
    let gpu = gpu();
    // SAFETY: it is what a compiler made of the text above.
    let module = unsafe { Module::load(&gpu, &code()) }?;
    let add = module.kernel("add")?;
    assert_eq!((add.name(), module.gpu()), ("add", &gpu));
    drop(module);
    const WORDS: u32 = 1_000_003;
    let len = u64::from(WORDS) * 4;
    let memory = GpuMemory::new(&gpu, len + 4)?;
    let stream = Stream::new(&gpu)?;
    stream.fill(&memory, 0, len + 4, 0)?;
    let mut sum = 0_u32;
    for number in [1, 1000, 70_000] {
        let args = args(memory.addr(), WORDS, number);
        // SAFETY: the memory is there until the stream is waited for below, and has these words.
        unsafe { add.launch(&stream, WORDS.div_ceil(256), 256, &args) }?;
        sum += number;
    }
    drop(add);
    let done = Event::new(&gpu)?;
    done.record(&stream)?;
    done.wait(soon())?;
    let mut bytes = vec![0; len as usize + 4];
    memory.read(0, &mut bytes)?;
    let (words, _) = bytes.as_chunks::<4>();
    let (last, all) = words.split_last().ok_or("no words")?;
    assert!(all.iter().all(|word| *word == sum.to_le_bytes()));
    assert_eq!(*last, [0; 4]);
    Ok(())
}

#[test]
fn a_launch_without_threads_or_with_too_many_is_refused() -> Outcome {
    let gpu = gpu();
    // SAFETY: it is what a compiler made of the text above.
    let add = unsafe { Module::load(&gpu, &code()) }?.kernel("add")?;
    let stream = Stream::new(&gpu)?;
    for (grid, block) in [(0, 1), (1, 0), (1, 1025)] {
        // SAFETY: there is no word that it may touch.
        let launched = unsafe { add.launch(&stream, grid, block, &args(0, 0, 0)) };
        assert_eq!(fault(launched), GpuFault::LaunchSize { grid, block });
    }
    Ok(())
}

#[test]
fn a_kernel_that_is_not_there_is_told_by_name() -> Outcome {
    // SAFETY: it is what a compiler made of the text above.
    let module = unsafe { Module::load(&gpu(), &code()) }?;
    for name in ["subtract", "ad", "sub\0add"] {
        let found = fault(module.kernel(name));
        let same = matches!(&found, GpuFault::NoKernel { name: n, refused } if n == name && refused.code.number == 500);
        assert!(same, "{found:?}");
    }
    Ok(())
}

#[test]
fn what_is_not_code_is_told_with_the_loaders_words() {
    let gpu = gpu();
    let images: &[&[u8]] = match gpu.runtime() {
        // HIP takes anything that begins rightly for code, and may abort.
        RuntimeKind::Hip => &[b"this is no code, and no compiler made it of any"],
        // CUDA goes by what a file says of its own length.
        RuntimeKind::Cuda => &[b"this is no code"],
        RuntimeKind::Host => &[b"", b"this is no code", &[0x7f, b'E', b'L', b'F', 0, 0]],
    };
    for image in images {
        // SAFETY: no loader takes it for code.
        let found = fault(unsafe { Module::load(&gpu, image) });
        let GpuFault::Module { arch, refused, .. } = &found else {
            panic!("{found}");
        };
        assert_eq!(*arch, gpu.info().arch);
        assert_ne!(refused.code.number, 0, "{found}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: runs from the folder that `cargo xtask gpu-bundle` makes, on a machine that has one"]
fn on_gpu_bad_ptx_is_told_with_the_compilers_log() {
    let gpu = gpu();
    assert_ne!(
        gpu.runtime(),
        RuntimeKind::Host,
        "no GPU: KVXFER_TEST_GPU names no GPU's runtime"
    );
    if gpu.runtime() == RuntimeKind::Hip {
        println!("PTX is NVIDIA's");
        return;
    }
    for (bad, word) in [
        (PTX.replace("mad.lo.u32", "mad.nonsense"), "nonsense"),
        (PTX.replace("[args+12]", "[arguments]"), "arguments"),
    ] {
        // SAFETY: it is text.
        let found = fault(unsafe { Module::load(&gpu, bad.as_bytes()) });
        println!("{found}");
        assert!(matches!(found, GpuFault::Module { .. }), "{found}");
        assert!(found.to_string().contains(word), "{found}");
    }
    let new = PTX.replace(".version 7.0", ".version 99.0");
    // SAFETY: it is text.
    let found = fault(unsafe { Module::load(&gpu, new.as_bytes()) });
    assert!(matches!(found, GpuFault::Module { .. }), "{found}");
    println!("{found}");
}
