//! The demo, and the binary that re-executes itself as a proxy, an engine or an agent.

fn main() -> std::process::ExitCode {
    if let Some(code) = outrigger_conformance::reexec::dispatch() {
        return code;
    }
    outrigger_conformance::demo::run(std::env::args_os())
}
