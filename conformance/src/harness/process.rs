//! A proxy, an agent or a control plane as a process of its own, to be killed, told to end, and watched as it does.

use super::{Client, PATIENCE, eventually, scratch};
use outrigger_xds::load::{Syntax, documents};
use serde_json::Value;
use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// Sends a signal (`TERM`, `KILL`, `STOP`, `CONT`) to a process. By the shell's own `kill`: the program of that name
/// comes with a package that a slim machine lacks.
///
/// # Panics
/// If the process is gone.
pub fn send_signal(pid: u32, name: &str) {
    let told = Command::new("sh")
        .args(["-c", &format!("kill -{name} {pid}")])
        .status();
    assert!(told.is_ok_and(|status| status.success()), "kill -{name}");
}

/// A child process; killed when dropped.
pub struct Process {
    child: Child,
    admin_path: PathBuf,
    error_path: PathBuf,
    /// Where its admin listens.
    pub admin: SocketAddr,
}

impl Process {
    /// Starts `program proxy` with free ports and further flags, and waits until it listens.
    ///
    /// # Panics
    /// If it does not.
    pub async fn proxy(program: &str, flags: &[&str]) -> Self {
        let mut all = Vec::new();
        for (name, value) in [
            ("--listen", "127.0.0.1:0"),
            ("--inbound", "127.0.0.1:0"),
            ("--admin", "127.0.0.1:0"),
            ("--access-log", "none"),
            ("--concurrency", "1"),
            ("--policy", "round_robin"),
            ("--canary", "off"),
        ] {
            if !flags.contains(&name) {
                all.extend([name, value]);
            }
        }
        all.extend(flags);
        Self::start(program, &all).await
    }

    /// Starts `program proxy -c CONFIG` with further flags, and waits until it listens.
    pub async fn with_config(program: &str, config: &str, flags: &[&str]) -> Self {
        Self::start(
            program,
            &[&["-c", config, "--concurrency", "1"], flags].concat(),
        )
        .await
    }

    /// Starts `program proxy` with exactly these flags, an admin and one worker, and waits until it listens.
    pub async fn driven(program: &str, flags: &[&str]) -> Self {
        let own = ["--admin", "127.0.0.1:0", "--concurrency", "1"];
        Self::start(program, &[&own, flags].concat()).await
    }

    async fn start(program: &str, flags: &[&str]) -> Self {
        let (admin_path, error_path) = (scratch("admin"), scratch("stderr"));
        let mut command = Command::new(program);
        command.arg("proxy");
        let errors = std::fs::File::create(&error_path).expect("invariant: a scratch file");
        command
            .args(flags)
            .arg("--admin-address-path")
            .arg(&admin_path);
        let child = command
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .expect("invariant: the program starts");
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut process = Self {
            child,
            admin_path,
            error_path,
            admin: unknown,
        };
        process.admin = eventually("the admin's address", || {
            let text = std::fs::read_to_string(&process.admin_path).unwrap_or_default();
            async move { text.trim().parse().ok() }
        })
        .await;
        process
    }

    /// Where a listener listens.
    pub async fn listener(&self, name: &str) -> SocketAddr {
        let all = Client::get(self.admin, "/listeners?format=json")
            .await
            .json();
        let statuses = all["listener_statuses"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let found = statuses
            .iter()
            .find(|status| status["name"] == name)
            .expect("invariant: a listener of this name");
        let socket = &found["local_address"]["socket_address"];
        let text = format!(
            "{}:{}",
            socket["address"].as_str().unwrap_or_default(),
            socket["port_value"]
        );
        text.parse().expect("invariant: an address")
    }

    /// Sends a signal (`TERM`, `KILL`, `STOP`, `CONT`).
    ///
    /// # Panics
    /// If the process is gone.
    pub fn signal(&self, name: &str) {
        send_signal(self.child.id(), name);
    }

    /// Waits for its end; `None` if it still runs after `limit`.
    pub async fn ended(&mut self, limit: Duration) -> Option<ExitStatus> {
        wait(&mut self.child, limit.min(PATIENCE)).await
    }

    /// What it wrote to standard error.
    #[must_use]
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.error_path).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.admin_path);
        let _ = std::fs::remove_file(&self.error_path);
    }
}

/// An agent as a child process; killed when dropped.
pub struct Agent {
    child: Child,
    error_path: PathBuf,
    /// Where it serves its feed.
    pub address: SocketAddr,
}

impl Agent {
    /// Starts `program agent` with these flags and waits until it listens, on a free port unless `--listen` says which.
    ///
    /// # Panics
    /// If it does not.
    pub async fn start(program: &str, flags: &[&str]) -> Self {
        let error_path = scratch("stderr");
        let errors = std::fs::File::create(&error_path).expect("invariant: a scratch file");
        let mut command = Command::new(program);
        command.arg("agent").args(flags);
        if !flags.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let child = command
            .env("NO_COLOR", "1")
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .expect("invariant: the program starts");
        let mut agent = Self {
            child,
            error_path,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
        };
        agent.address = eventually("the agent's address", || {
            let text = agent.log();
            async move { served_at(&text) }
        })
        .await;
        agent
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn signal(&self, name: &str) {
        send_signal(self.child.id(), name);
    }

    /// Waits for its end; `None` if it still runs after `limit`.
    pub async fn ended(&mut self, limit: Duration) -> Option<ExitStatus> {
        wait(&mut self.child, limit.min(PATIENCE)).await
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.error_path).unwrap_or_default()
    }
}

/// The address in the line that says that the feed is served.
fn served_at(log: &str) -> Option<SocketAddr> {
    let line = log.lines().find(|line| line.contains("serving the feed"))?;
    let (_, rest) = line.split_once("address=")?;
    rest.split_whitespace().next()?.parse().ok()
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.error_path);
    }
}

/// A control plane as a child process; killed when dropped.
pub struct ControlPlane {
    child: Child,
    error_path: PathBuf,
    /// Where it serves xDS.
    pub address: SocketAddr,
    /// Where its admin is.
    pub admin: SocketAddr,
}

/// `deploy/bootstrap/driven.yaml` for a proxy of this id and the control plane at this address, its admin on any port.
///
/// # Panics
/// If the file is not as it was.
#[must_use]
pub fn driven_bootstrap(control: SocketAddr, node: &str) -> Value {
    const DRIVEN: &str = include_str!("../../../deploy/bootstrap/driven.yaml");
    let mut documents = documents(DRIVEN, Syntax::Yaml).expect("invariant: a good file");
    let mut config = documents.swap_remove(0);
    let mut set = |pointer: &str, value: Value| {
        let found = config.pointer_mut(pointer);
        *found.expect("invariant: it is there") = value;
    };
    set("/node/id", node.into());
    set("/admin/address/socket_address/port_value", 0.into());
    let endpoint =
        "/static_resources/clusters/0/load_assignment/endpoints/0/lb_endpoints/0/endpoint";
    let at = |field: &str| format!("{endpoint}/address/socket_address/{field}");
    set(&at("address"), control.ip().to_string().into());
    set(&at("port_value"), control.port().into());
    config
}

impl ControlPlane {
    /// Starts `program control-plane serve` on a directory, and waits until it listens.
    ///
    /// # Panics
    /// If it does not.
    pub async fn start(program: &str, directory: &str, listen: SocketAddr) -> Self {
        Self::with_flags(program, directory, listen, &[]).await
    }

    /// The same, with these flags.
    ///
    /// # Panics
    /// If it does not listen.
    pub async fn with_flags(
        program: &str,
        directory: &str,
        listen: SocketAddr,
        flags: &[&str],
    ) -> Self {
        let error_path = scratch("stderr");
        let errors = std::fs::File::create(&error_path).expect("invariant: a scratch file");
        let mut command = Command::new(program);
        command
            .args(["control-plane", "serve", "--config", directory])
            .args(["--listen", &listen.to_string(), "--admin", "127.0.0.1:0"])
            .args(["--drain-time-s", "0"])
            .args(flags)
            .env("NO_COLOR", "1")
            .stdout(Stdio::null())
            .stderr(errors);
        let child = command.spawn().expect("invariant: the program starts");
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut started = Self {
            child,
            error_path,
            address: unknown,
            admin: unknown,
        };
        (started.address, started.admin) = eventually("the control plane's addresses", || {
            let text = std::fs::read_to_string(&started.error_path).unwrap_or_default();
            async move {
                let line = text.lines().find(|line| line.contains("serving xDS"))?;
                let at = |field: &str| {
                    let (_, rest) = line.split_once(field)?;
                    rest.split_whitespace().next()?.parse().ok()
                };
                Some((at("address=")?, at("admin=")?))
            }
        })
        .await;
        started
    }

    /// kill -9, and waits until it is gone.
    ///
    /// # Panics
    /// If it is gone already.
    pub async fn kill(&mut self) {
        self.signal("KILL");
        let ended = self.ended().await;
        assert!(ended.is_some(), "kill -9 ends a process");
    }

    /// Sends a signal (`TERM`, `KILL`, `STOP`, `CONT`).
    ///
    /// # Panics
    /// If the process is gone.
    pub fn signal(&self, name: &str) {
        send_signal(self.child.id(), name);
    }

    /// Waits for its end; `None` if it still runs after [`PATIENCE`].
    pub async fn ended(&mut self) -> Option<ExitStatus> {
        wait(&mut self.child, PATIENCE).await
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.error_path);
    }
}

/// Waits for a process to end.
async fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("invariant: our child") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
