//! Shared libraries that may be missing, as tables of functions: every symbol is looked up when the library is opened, so that nothing is
//! missing later. Results come as plain numbers, since a newer library may know more of them than this program does.

use super::Error;

/// Opens a library by its name, as the dynamic linker finds it beside this program's libtorch or in the system. It stays for good, also where
/// it is refused later: the threads that it may have started run in it.
pub(crate) fn open(file: &str, remedy: &str) -> Result<&'static libloading::Library, Error> {
    // SAFETY: NVIDIA's and PyTorch's libraries may be loaded at any time; what their initialisers do is register themselves.
    let library = unsafe { libloading::Library::new(file) }.map_err(|error| missing(file, remedy, &error))?;
    Ok(Box::leak(Box::new(library)))
}

fn missing(file: &str, remedy: &str, error: &libloading::Error) -> Error {
    Error::not_available(format!("{file} cannot be loaded; {remedy} ({})", reason(error)))
}

/// What the dynamic linker says.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Declares a table of a library's C functions, and how to open it.
macro_rules! library {
    ($(#[$doc:meta])* $name:ident {
        $($symbol:ident as $field:ident($($argument:ty),*) -> $result:ty;)*
    }) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub(crate) struct $name {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $name {
            pub(crate) fn open(file: &str, remedy: &str) -> Result<Self, $crate::cuda::Error> {
                let library = $crate::cuda::open_library(file, remedy)?;
                $(
                    // SAFETY: the type is that of the library's header; the library stays for good.
                    let found = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> $result>(stringify!($symbol).as_bytes())
                    };
                    let $field = match found {
                        Ok(symbol) => *symbol,
                        Err(error) => return Err($crate::cuda::missing_symbol(file, stringify!($symbol), &error)),
                    };
                )*
                Ok(Self { $($field,)* })
            }
        }
    };
}
pub(crate) use library;

/// An older library than this program needs.
pub(crate) fn missing_symbol(file: &str, symbol: &str, error: &libloading::Error) -> Error {
    Error::not_available(format!("{file} has no {symbol}; it is too old ({})", reason(error)))
}
