//! An application that opens its secrets once, keeps them open and watches for the next generation.

use std::fs::File;
use std::io::Write;
use std::mem::MaybeUninit;
use std::path::Path;
use std::process::ExitCode;

use rustix::fs::inotify;

/// Opens every file, then prints `moved` for each swap of a `..data` link in their directories, until SIGTERM.
pub(crate) fn run(files: &[String]) -> ExitCode {
    crate::end_at_sigterm();
    let mut open = Vec::new();
    for file in files {
        match File::open(file) {
            Ok(file) => open.push(file),
            Err(error) => {
                eprintln!("{file}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    for file in files {
        let directory = Path::new(file).parent().unwrap();
        inotify::add_watch(&watch, directory, inotify::WatchFlags::MOVED_TO).unwrap();
    }
    say("holding");
    if files.is_empty() {
        loop {
            std::thread::park();
        }
    }
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    loop {
        if let Ok(event) = events.next()
            && event.file_name().is_some_and(|name| name.to_bytes() == b"..data")
        {
            say("moved");
        }
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
}
