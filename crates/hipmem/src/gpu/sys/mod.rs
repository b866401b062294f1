//! The GPU runtimes' C interfaces, opened when they are first needed: types, constants and functions
//! by the names of C.
//!
//! Nothing here is checked by C. That the declarations are right is shown by tests/abi, which compares HIP's
//! with the headers and CUDA's with what bindgen made of cuda.h. No value from C is undefined behaviour:
//! error codes and other enumerations are integers with names.

#[allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    reason = "names of C, and fields that only C uses"
)]
pub(super) mod cuda_types;
#[allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    reason = "names of C, and fields that only C uses"
)]
pub(super) mod hip_types;

mod cuda;
mod hip;
mod hsa;
mod library;

pub(super) use cuda::Cuda;
pub(super) use hip::Hip;
pub(super) use hsa::{Hsa, hsa_status_t};
pub(super) use library::Library;

/// Makes a table of functions from their prototypes.
macro_rules! functions {
    (
        $(#[$about:meta])*
        $table:ident
        required { $(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)* }
        optional { $(fn $may:ident($($marg:ident: $mty:ty),*) $(-> $mret:ty)?;)* }
    ) => {
        $(#[$about])*
        #[allow(non_snake_case, reason = "names of C")]
        pub(in crate::gpu) struct $table {
            $(pub(in crate::gpu) $name: unsafe extern "C" fn($($ty),*) $(-> $ret)?,)*
            $(pub(in crate::gpu) $may: Option<unsafe extern "C" fn($($mty),*) $(-> $mret)?>,)*
        }

        impl $table {
            /// Finds them all.
            ///
            /// # Errors
            ///
            /// [`NoGpu::Symbol`](crate::gpu::NoGpu::Symbol) for the first that is missing.
            pub(in crate::gpu) fn find(
                library: &$crate::gpu::sys::Library,
            ) -> Result<Self, $crate::gpu::NoGpu> {
                Ok(Self {
                    $($name: {
                        let address = library.required(stringify!($name))?;
                        // SAFETY: a symbol of this name is a function of this prototype: tests/abi
                        // compares them with C.
                        unsafe {
                            std::mem::transmute::<
                                std::ptr::NonNull<std::ffi::c_void>,
                                unsafe extern "C" fn($($ty),*) $(-> $ret)?,
                            >(address)
                        }
                    },)*
                    $($may: {
                        let address = library.symbol(stringify!($may));
                        // SAFETY: as above; an option of a function is a pointer that may be null,
                        // and so is an option of `NonNull`.
                        unsafe {
                            std::mem::transmute::<
                                Option<std::ptr::NonNull<std::ffi::c_void>>,
                                Option<unsafe extern "C" fn($($mty),*) $(-> $mret)?>,
                            >(address)
                        }
                    },)*
                })
            }

            /// Names of what must be there.
            #[cfg(test)]
            #[allow(dead_code, reason = "not every library has a double in the tests")]
            pub(in crate::gpu) const REQUIRED: &[&str] = &[$(stringify!($name),)*];
        }
    };
}
use functions;
