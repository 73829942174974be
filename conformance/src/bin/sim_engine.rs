//! The simulated engine as a program; everything is in `outrigger_conformance::sim`.

fn main() -> std::process::ExitCode {
    outrigger_conformance::sim::run(std::env::args_os())
}
