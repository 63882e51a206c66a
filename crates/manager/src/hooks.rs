//! Hooks that start and stop machines (row D12): programs of the operator, each run in a thread of its own.

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use crate::actor::Event;

/// A hook that takes longer is ended.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause between two looks at a hook.
const LOOK: Duration = Duration::from_millis(50);
/// Words of a hook that are told.
const WORDS_BYTES_MAX: u64 = 2_000;

/// Runs `hook` in `folder` by a shell with `start` or `stop` and the node id as its arguments, which are in `ANABRANCH_ACTION` and
/// `ANABRANCH_NODE` too. An [`Event::Hook`] tells how it ended.
pub fn run(hook: &str, folder: &Path, action: &'static str, node: u16, events: &SyncSender<Event>) {
    let (hook, folder) = (hook.to_owned(), folder.to_owned());
    let told = events.clone();
    let work = move || {
        let result = carry_out(&hook, &folder, action, node).map_err(|why| format!("{action} hook: {why}"));
        // The manager may have ended.
        let _ = told.send(Event::Hook { node, result });
    };
    if let Err(error) = std::thread::Builder::new().name("hook".to_owned()).spawn(work) {
        // Not from here: the queue may be full of what its reader, who calls this, has to take.
        let _ =
            events.try_send(Event::Hook { node, result: Err(format!("{action} hook: no thread: {error}")) });
    }
}

fn carry_out(hook: &str, folder: &Path, action: &str, node: u16) -> Result<(), String> {
    let node = node.to_string();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{hook} \"$@\""), hook, action, &node]);
    command.current_dir(folder).env("ANABRANCH_ACTION", action).env("ANABRANCH_NODE", &node);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("sh: {error}"))?;
    let words = child.stderr.take();
    // In a thread: a machine that the hook leaves behind may keep it open.
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = words.map(|words| words.take(WORDS_BYTES_MAX).read_to_end(&mut text));
        let _ = sender.send(String::from_utf8_lossy(&text).trim().to_owned());
    });
    let status = wait(&mut child)?;
    if status.success() {
        return Ok(());
    }
    let words = receiver.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
    Err(format!("{status}: {words}"))
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus, String> {
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if began.elapsed() < PATIENCE => std::thread::sleep(LOOK),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("ended after {} s", PATIENCE.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_hook_gets_its_arguments_and_its_words_are_told_when_it_fails() {
        assert_eq!(
            carry_out(
                "test start,7,/ = \"$ANABRANCH_ACTION,$ANABRANCH_NODE,$PWD\" &&: ",
                Path::new("/"),
                "start",
                7
            ),
            Ok(())
        );
        let hook = "f() { echo \"no $1 of $2\" >&2; exit 3; }; f";
        let said = carry_out(hook, Path::new("/"), "stop", 12).unwrap_err();
        assert!(said.contains("exit status: 3") && said.contains("no stop of 12"), "{said}");
    }
}
