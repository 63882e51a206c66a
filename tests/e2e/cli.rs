//! The command line as people and scripts meet it, through the built program.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use testbed::program::ScratchDir;

fn anabranch(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .args(arguments)
        .env_remove("ANABRANCH_LOG")
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input is fine.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn site(directory: &ScratchDir, name: &str, contents: &str) -> String {
    directory.write("node.key", "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=\n").unwrap();
    let path = directory.write(name, contents).unwrap();
    path.to_str().unwrap().to_owned()
}

const GOOD: &str = "[node]\nname = \"branch\"\nprivate-key-file = \"node.key\"\n[tun]\naddress = [\"10.77.0.1/24\"]\n\
                    [[peer]]\nname = \"hub\"\npublic-key = \"3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\"\n\
                    endpoints = [\"198.18.0.2:4600\"]\nallowed-ips = [\"10.77.0.2/32\"]\n";

#[test]
fn keys_are_made_and_derived() {
    let key = anabranch(&["genkey"], "");
    assert_eq!(code(&key), 0);
    let key = text(&key.stdout);
    assert_eq!((key.len(), key.ends_with("=\n")), (45, true), "{key}");
    let public = anabranch(&["pubkey"], &key);
    assert_eq!((code(&public), public.stdout.len()), (0, 45));
    assert_eq!(public.stdout, anabranch(&["pubkey"], key.trim()).stdout);
    // Alice of RFC 7748 §6.1.
    let alice = anabranch(&["pubkey"], "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=\n");
    assert_eq!(text(&alice.stdout), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n");
}

#[test]
fn rubbish_is_not_a_key() {
    for (input, reason) in
        [("", "the key is empty"), ("hello", "not base64"), ("aGVsbG8=", "5 bytes instead of 32")]
    {
        let output = anabranch(&["pubkey"], input);
        assert_eq!((code(&output), output.stdout.is_empty()), (1, true));
        let said = text(&output.stderr);
        assert!(said.contains(reason) && said.contains("anabranch genkey"), "{said}");
    }
}

#[test]
fn a_key_file_others_can_read_is_mentioned() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let run = |mask: &str, file: &str| {
        let script = format!("umask {mask}; \"$0\" genkey > {file}");
        let program = env!("CARGO_BIN_EXE_anabranch");
        let output = Command::new("sh").args(["-c", &script, program]).current_dir(directory.path()).output();
        text(&output.unwrap().stderr)
    };
    assert!(run("022", "open").contains("use umask 077"));
    assert_eq!(run("077", "closed"), "");
}

#[test]
fn check_says_ok() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let file = site(&directory, "site.toml", GOOD);
    let output = anabranch(&["check", &file], "");
    assert_eq!((code(&output), text(&output.stderr)), (0, String::new()));
    let expected = format!(
        "{file}: OK: node branch on ana0, only dials, all cores; WANs: the host's default route; peers: hub; \
         public key hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n"
    );
    assert_eq!(text(&output.stdout), expected);
}

#[test]
fn check_warns_of_an_interface_that_is_not_there() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let file = site(&directory, "site.toml", &format!("{GOOD}[[wan]]\ninterface = \"nosuchwan\"\n"));
    let output = anabranch(&["check", &file], "");
    assert_eq!(code(&output), 0);
    assert_eq!(
        text(&output.stderr),
        format!(
            "{file}: warning: wan.interface: there is no interface \"nosuchwan\" now; it is used as soon as it comes\n"
        )
    );
}

#[test]
fn check_and_up_name_file_line_key_and_what_is_right() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let wrong = GOOD.replace("10.77.0.1/24", "10.77.0.1").replace("endpoints", "endpoint");
    let file = site(&directory, "site.toml", &wrong);
    let expected = format!(
        "{file}:5:12: error: tun.address: \"10.77.0.1\" has no prefix length; write for example \"10.77.0.1/24\"\n\
         {file}:6:1: error: peer.endpoints: missing, and [node] has no listen, so that neither side can dial the \
         other; write endpoints = [\"198.18.0.2:4600\"] here or listen = 4600 there\n\
         {file}:9:1: error: peer.endpoint: unknown key; did you mean \"endpoints\"?\n"
    );
    for command in ["check", "up"] {
        let output = anabranch(&[command, &file], "");
        assert_eq!((code(&output), text(&output.stderr)), (1, expected.clone()), "{command}");
        assert!(output.stdout.is_empty());
    }
    let output = anabranch(&["up", "/nonexistent.toml"], "");
    assert_eq!(code(&output), 1);
    assert!(text(&output.stderr).starts_with("/nonexistent.toml: error: cannot read the configuration"));
}

/// A configuration that is right in itself, and that a start on this host refuses.
#[test]
fn check_refuses_what_up_would_refuse() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let cases = [
        (GOOD.replace("[tun]", "cores = [1000]\n[tun]"), "node.cores: CPU 1000 is not available"),
        (GOOD.replace("[tun]", "[tun]\nname = \"lo\""), "tun.name: \"lo\" is a network device of this host"),
    ];
    for (number, (config, said)) in cases.iter().enumerate() {
        let file = site(&directory, &format!("{number}.toml"), config);
        let output = anabranch(&["check", &file], "");
        assert_eq!((code(&output), output.stdout.is_empty()), (1, true), "{said}");
        assert!(text(&output.stderr).contains(&format!("{file}: error: {said}")), "{}", text(&output.stderr));
        let socket = directory.path().join("gw.sock");
        let output = anabranch(&["up", &file, "--socket", socket.to_str().unwrap()], "");
        assert_eq!(code(&output), 4, "{said}: {}", text(&output.stderr));
    }
}

#[test]
fn nothing_runs_here() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let socket = directory.path().join("none.sock");
    for command in ["status", "reload", "stop"] {
        let output = anabranch(&[command, "--socket", socket.to_str().unwrap()], "");
        assert_eq!((code(&output), output.stdout.is_empty()), (3, true), "{command}");
        assert!(text(&output.stderr).contains("no gateway is running"), "{command}");
    }
}

#[test]
fn usage() {
    for arguments in [&["dance"][..], &["check"], &["up"], &["status", "--jsno"], &[]] {
        assert_eq!(code(&anabranch(arguments, "")), 2, "{arguments:?}");
    }
    let help = anabranch(&["--help"], "");
    assert_eq!(code(&help), 0);
    let help = text(&help.stdout);
    for part in
        ["Exit codes:", "Examples:", "demo", "genkey", "pubkey", "up", "check", "status", "reload", "stop"]
    {
        assert!(help.contains(part), "{part} is missing in\n{help}");
    }
}

#[test]
fn a_wrong_log_level_is_said_and_a_wrong_variable_is_not_fatal() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let file = site(&directory, "site.toml", GOOD);
    let output = anabranch(&["--log", "a=b=c", "up", &file], "");
    assert_eq!(code(&output), 4);
    assert!(text(&output.stderr).contains("not a level or filter"), "{}", text(&output.stderr));
}

#[test]
fn the_example_configurations_are_right() {
    let etc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../etc");
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(etc).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        count += 1;
        let name = path.file_name().unwrap().to_str().unwrap();
        let file = site(&directory, name, &std::fs::read_to_string(&path).unwrap());
        let output = anabranch(&["check", &file], "");
        let said = text(&output.stderr);
        assert_eq!(code(&output), 0, "{name}:\n{said}");
        // Interfaces that this machine does not have are all there is to say.
        assert!(said.lines().all(|line| line.contains("there is no interface")), "{name}:\n{said}");
    }
    assert!(count >= 3, "{count} examples");
}

/// The query of docs/nat.md for a port at a time.
fn holder(log: &str, port: u16, at_ms: u64) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/nat.md");
    let page = std::fs::read_to_string(page).unwrap();
    let begin = page.find("jq -c --arg a").unwrap();
    let query = page[begin..].split("```").next().unwrap();
    let query = query.replace("29888", &port.to_string()).replace("1795265562000", &at_ms.to_string());
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    directory.write("anabranch-nat.json", log).unwrap();
    let output = Command::new("sh").args(["-c", &query]).current_dir(directory.path()).output().unwrap();
    assert_eq!(text(&output.stderr), "", "jq is needed");
    let answer = text(&output.stdout);
    let word = |key: &str| {
        let rest = answer.split(&format!("\"{key}\":\"")).nth(1)?;
        rest.split('"').next().map(str::to_owned)
    };
    format!("{} {}", word("event").unwrap_or_default(), word("inside").unwrap_or_default())
}

#[test]
fn the_documented_query_names_who_had_a_port() {
    let log = "\
{\"time_unix_ms\":1000,\"event\":\"log-begins\",\"note\":\"the gateway starts: nothing is open\"}
{\"time_unix_ms\":2000,\"event\":\"block-granted\",\"protocol\":\"any\",\"inside\":\"10.0.0.5:0\",\"outside\":\"203.0.113.41:29696\",\"ports\":1024}
{\"time_unix_ms\":2500,\"event\":\"lost\",\"lines\":5,\"note\":\"lines are missing before this one\"}
{\"time_unix_ms\":2600,\"event\":\"log-ends\",\"note\":\"switched off or moved by a reload: what is open goes on\"}
{\"time_unix_ms\":2700,\"event\":\"log-begins\",\"note\":\"switched on while running: what is open already is not listed\"}
{\"time_unix_ms\":5000,\"event\":\"log-begins\",\"note\":\"the gateway starts: nothing is open\"}
{\"time_unix_ms\":6000,\"event\":\"opened\",\"protocol\":\"tcp\",\"inside\":\"10.0.0.6:77\",\"outside\":\"203.0.113.41:29888\",\"remote\":\"198.51.100.7:80\"}
{\"time_unix_ms\":7000,\"event\":\"closed\",\"protocol\":\"tcp\",\"inside\":\"10.0.0.6:77\",\"outside\":\"203.0.113.41:29888\",\"remote\":\"198.51.100.7:80\"}
";
    assert_eq!(holder(log, 29888, 1500), "log-begins ");
    assert_eq!(
        holder(log, 29888, 4000),
        "block-granted 10.0.0.5:0",
        "the log moved, the gateway did not end"
    );
    assert_eq!(holder(log, 30720, 4000), "log-begins ", "the block ends before");
    assert_eq!(holder(log, 29888, 5500), "log-begins ", "it was killed at some time before 5000");
    assert_eq!(holder(log, 29888, 6500), "opened 10.0.0.6:77");
    assert_eq!(holder(log, 29888, 7500), "closed 10.0.0.6:77");
}

#[test]
fn check_counts_in_words_and_needs_no_key_without_a_tunnel() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let router = "[gateway]\ndefault-action = \"drop\"\n[[interface]]\nname = \"lo0\"\n[[nat]]\nout = \"lo0\"\n[[rule]]\n\
                  action = \"allow\"\nto = \"gateway\"\n";
    let one = anabranch(&["check", &site(&directory, "one.toml", router)], "");
    assert!(
        text(&one.stdout).ends_with("; no peers; interfaces: lo0, 1 rule, 1 NAT\n"),
        "{}",
        text(&one.stdout)
    );
    let two = format!("{router}[[rule]]\naction = \"allow\"\nfrom = \"lo0\"\n");
    let two = anabranch(&["check", &site(&directory, "two.toml", &two)], "");
    assert!(text(&two.stdout).ends_with(", 2 rules, 1 NAT\n"), "{}", text(&two.stdout));
}

#[test]
fn a_replay_spares_its_input_and_uses_what_is_whole_of_a_capture() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let config = "[[interface]]\nname = \"lan\"\naddress = \"10.0.0.1/24\"\n";
    let config = site(&directory, "replay.toml", config);
    // Little-endian, microseconds, raw IP; one frame that is no packet, and one that is cut.
    let mut capture =
        vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 101, 0, 0, 0];
    capture.extend([0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 0x45, 0, 0, 0]);
    capture.extend([0, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 40, 0, 0, 0, 0x45]);
    let input = directory.path().join("in.pcap");
    std::fs::write(&input, &capture).unwrap();
    std::os::unix::fs::symlink(&input, directory.path().join("link.pcap")).unwrap();
    let run = |out: &str| {
        let out = directory.path().join(out);
        let arguments =
            ["replay", "--in", input.to_str().unwrap(), "--out", out.to_str().unwrap(), "--config", &config];
        anabranch(&arguments, "")
    };
    for same in ["in.pcap", "link.pcap"] {
        let output = run(same);
        assert_eq!(code(&output), 2);
        assert!(text(&output.stderr).contains("--out is the same file as --in"), "{}", text(&output.stderr));
        assert_eq!(std::fs::read(&input).unwrap(), capture);
    }
    std::os::unix::fs::symlink("/dev/full", directory.path().join("full.pcap")).unwrap();
    let output = run("full.pcap");
    assert_eq!(code(&output), 4, "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("full.pcap: No space left"), "{}", text(&output.stderr));
    let output = run("out.pcap");
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("ends within a frame"), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("1 frames read"), "{}", text(&output.stdout));
}

/// A proxy of the environment is not asked for the manager, which is near: it would read the token.
#[test]
fn the_token_goes_to_the_manager_alone() {
    let directory = ScratchDir::new("anabranch-cli").unwrap();
    let token = site(&directory, "token", "0123456789abcdef0123456789abcdef");
    let listen = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (manager, proxy) = (listen(), listen());
    proxy.set_nonblocking(true).unwrap();
    let at = |listener: &std::net::TcpListener| format!("http://{}", listener.local_addr().unwrap());
    let child = Command::new(env!("CARGO_BIN_EXE_anabranch"))
        .args(["cluster", "plan", "--api", &at(&manager), "--token-file", &token])
        .env("http_proxy", at(&proxy))
        .env("ALL_PROXY", at(&proxy))
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    let mut child = child.unwrap();
    manager.set_nonblocking(true).unwrap();
    let asked = (0..1_000).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert!(proxy.accept().is_err(), "the proxy was asked");
        manager.accept().ok()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(asked.is_some(), "nobody was asked");
}

#[test]
fn help_is_text_and_has_examples() {
    let help = text(&anabranch(&["explain", "--help"], "").stdout);
    assert!(help.contains("\"peer:NAME\" or \"gateway\"") && !help.contains('\\'), "{help}");
    let help = text(&anabranch(&["lease", "take", "--help"], "").stdout);
    assert!(help.contains("anabranch lease take pod-1"), "{help}");
}
