//! The proxy's process: everything is in the library.

fn main() -> std::process::ExitCode {
    outrigger_proxy::run(std::env::args_os())
}
