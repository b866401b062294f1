//! What is said where there is no GPU. Debian's HIP is a real library that finds none.

use kvxfer_hipmem::Error;
use kvxfer_hipmem::gpu::{GpuRuntime, NoGpu, RuntimeChoice, RuntimeKind};

#[test]
fn hip_without_a_gpu_says_so_in_its_own_words() {
    let opened = GpuRuntime::open(RuntimeChoice::Only(RuntimeKind::Hip));
    let why = match opened {
        // A machine that has one: the tests of gpu are for it.
        Ok(runtime) => {
            assert!(!runtime.gpus().is_empty());
            return;
        }
        Err(Error::NoGpu(why)) => why,
        Err(other) => panic!("{other}"),
    };
    let words = why.to_string();
    println!("{words}");
    match why {
        NoGpu::NoDevice {
            runtime,
            library,
            refused,
        } => {
            assert_eq!(runtime, RuntimeKind::Hip);
            assert!(
                library.to_string_lossy().contains("libamdhip64"),
                "{library:?}"
            );
            let refused = refused.expect("HIP answers with a code");
            assert!(
                ["hipInit", "hipGetDeviceCount"].contains(&refused.call),
                "{refused}"
            );
            assert!([100, 101].contains(&refused.code.number), "{refused}");
            assert!(refused.code.name.starts_with("hipError"), "{refused}");
            for part in [
                refused.code.name.as_str(),
                "/dev/kfd",
                "HIP_VISIBLE_DEVICES",
            ] {
                assert!(words.contains(part), "{words}");
            }
        }
        NoGpu::Library { tried } => {
            assert!(
                std::env::var_os("KVXFER_NEED_HIP").is_none(),
                "libamdhip64 must be here: {words}"
            );
            let names: Vec<_> = tried.iter().map(|t| t.name.to_string_lossy()).collect();
            let wanted = [
                "libamdhip64.so.7",
                "libamdhip64.so.6",
                "libamdhip64.so.5",
                "libamdhip64.so",
            ];
            assert_eq!(names, wanted);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn auto_says_of_both_why_not_and_never_takes_the_stand_in() {
    match GpuRuntime::open(RuntimeChoice::Auto) {
        Ok(runtime) => assert_ne!(runtime.kind(), RuntimeKind::Host),
        Err(Error::NoGpu(NoGpu::Neither { hip, cuda })) => {
            let words = NoGpu::Neither { hip, cuda }.to_string();
            assert!(
                words.starts_with("HIP: ") && words.contains("CUDA: "),
                "{words}"
            );
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn runtimes_are_chosen_by_name() {
    for (text, choice) in [
        ("auto", RuntimeChoice::Auto),
        ("hip", RuntimeChoice::Only(RuntimeKind::Hip)),
        ("cuda", RuntimeChoice::Only(RuntimeKind::Cuda)),
        ("host", RuntimeChoice::Only(RuntimeKind::Host)),
    ] {
        assert_eq!(text.parse(), Ok(choice));
    }
    let refused = "rocm".parse::<RuntimeChoice>().map_err(|e| e.to_string());
    let words = "\"rocm\" is no GPU runtime: there are auto, hip, cuda and host";
    assert_eq!(refused, Err(words.to_owned()));
}
