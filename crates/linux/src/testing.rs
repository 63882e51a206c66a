//! For tests, here and in the crates above: a network of one's own.

use std::process::Command;

use crate::netns;

/// Set in a test process that is already inside a user namespace made by [`isolated`].
pub(crate) const INSIDE: &str = "ANABRANCH_TEST_INSIDE_NAMESPACE";

/// Runs a test in a new network namespace, where it may do what it likes: as root directly, as an ordinary
/// user by running this very test again in a user namespace. Where the system allows neither, the test fails
/// and says so.
///
/// # Panics When the test fails or no namespace can be had.
pub fn isolated(test: impl FnOnce() + Send) {
    if std::env::var_os(INSIDE).is_some() {
        // The process was started in a fresh namespace; only its loopback is missing.
        if let Err(error) = crate::netlink::Netlink::open().and_then(|netlink| netlink.set_up(1, true)) {
            panic!("cannot use the namespace made for this test: {error}");
        }
        return test();
    }
    if netns::is_privileged() {
        let result = netns::Namespace::create().and_then(|namespace| namespace.run(test));
        if let Err(error) = result {
            panic!("this test needs a network namespace: {error}");
        }
        return;
    }
    if let Err(error) = again_in_user_namespace() {
        panic!("this test needs root or a user namespace: {}: {error}", netns::USER_NAMESPACE_REFUSED);
    }
}

/// The test harness names each test's thread after the test.
fn again_in_user_namespace() -> std::io::Result<()> {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or_default();
    let mut command = Command::new(std::env::current_exe()?);
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    netns::prepare_command_in_user_namespace(&mut command);
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed in a user namespace:\n{text}\n{errors}");
    assert!(text.contains("1 passed"), "{name} did not run in the user namespace:\n{text}\n{errors}");
    Ok(())
}
