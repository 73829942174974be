//! The control plane's process; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    outrigger_control_plane::run(std::env::args_os())
}
