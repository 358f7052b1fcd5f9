//! Confinement, proven from inside: system calls that hostile code would make, made by the confined processes themselves, each with
//! what came of it; with all protections, and with the upper ones taken away, so that the lower ones are seen to hold by themselves.
//! And other kernels, which have less.

mod attempt;
mod calls;
mod connector;
mod inherited;
mod kernels;
mod layers;
mod minimal;
mod stage;
mod tour;

use crate::harness::*;
use libtest_mimic::Trial;
use stage::ROLES;

const NEEDS: &[Need] = &[Need::Root, Need::X86_64, Need::NewKernel];

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for role in ROLES {
        let name = role.name();
        tests.push(test(
            &format!("confinement: {name}: every hostile call is death or refused"),
            NEEDS,
            move |test| layers::filtered(test, role),
        ));
        tests.push(test(
            &format!(
                "confinement: {name}, without its filter: what else there is refuses by itself"
            ),
            NEEDS,
            move |test| layers::beneath(test, role),
        ));
        tests.push(test(
            &format!("confinement: {name}: it has no descriptor but those that it needs"),
            NEEDS,
            move |test| inherited::descriptors(test, role),
        ));
    }
    for role in ROLES {
        tests.push(test(
            &format!(
                "confinement: {}, without filter, Landlock and MDWE: ids, root and limits refuse by themselves",
                role.name()
            ),
            NEEDS,
            move |test| layers::bare(test, role),
        ));
    }
    tests.push(test(
        "confinement: capabilities that the superserver left to be inherited are given up",
        &[Need::Root, Need::Command("setpriv", "util-linux")],
        inherited::inheritable,
    ));
    tests.push(test(
        "confinement: the connector can write, execute, signal and wait for connections nowhere",
        NEEDS,
        connector::connector,
    ));
    tests.extend([
        test(
            "confinement: on kernels with each Landlock from none to the newest, with and without MDWE, sessions work",
            NEEDS,
            kernels::kernels,
        ),
        test(
            "confinement: what Landlock denies grows with its ABI",
            NEEDS,
            kernels::abis,
        ),
        test(
            "confinement: what the kernel lacks is warned of once by the listener, and by a connection with -v alone",
            NEEDS,
            kernels::warnings,
        ),
        test(
            "confinement: what is required and lacking ends with BYE and 100, and with 100 under --check and --listen",
            NEEDS,
            kernels::required,
        ),
        test(
            "confinement: what is required and there is served",
            NEEDS,
            kernels::satisfied,
        ),
        test(
            "confinement: the systemd units let Landlock and seccomp through",
            &[],
            kernels::units,
        ),
    ]);
    tests.extend(minimal::tests());
    tests
}
