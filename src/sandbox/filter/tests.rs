//! The tables, the trees that libseccomp made of them and what seccompiler makes of them agree, by running all of them.

use nix::libc;

use super::*;

const ROLES: [(&str, Role); 5] = [
    ("KEEPER", Role::Keeper),
    ("KEEPER_SERVICE", Role::KeeperService),
    ("NETWORK", Role::Network),
    ("OPENER", Role::Opener),
    ("SHARED_KEEPER", Role::SharedKeeper),
];

/// An architecture's name, its number for audit(7), its trees in the order of [`ROLES`], and its calls' numbers.
type Architecture = (
    &'static str,
    u32,
    [&'static [sock_filter]; 5],
    &'static [(&'static str, u32)],
);

const ARCHITECTURES: [Architecture; 3] = [
    (
        "aarch64",
        0xc000_00b7,
        [
            aarch64::KEEPER,
            aarch64::KEEPER_SERVICE,
            aarch64::NETWORK,
            aarch64::OPENER,
            aarch64::SHARED_KEEPER,
        ],
        aarch64::NUMBERS,
    ),
    (
        "riscv64",
        0xc000_00f3,
        [
            riscv64::KEEPER,
            riscv64::KEEPER_SERVICE,
            riscv64::NETWORK,
            riscv64::OPENER,
            riscv64::SHARED_KEEPER,
        ],
        riscv64::NUMBERS,
    ),
    (
        "x86_64",
        0xc000_003e,
        [
            x86_64::KEEPER,
            x86_64::KEEPER_SERVICE,
            x86_64::NETWORK,
            x86_64::OPENER,
            x86_64::SHARED_KEEPER,
        ],
        x86_64::NUMBERS,
    ),
];

/// What the kernel tells a filter about a system call: `struct seccomp_data`.
#[derive(Debug)]
struct Call {
    architecture: u32,
    arguments: [u64; 6],
    number: u32,
}

impl Call {
    /// The 32 bits at an offset; the architectures here are little-endian.
    fn word(&self, offset: u32) -> u32 {
        let of = |value: u64, offset: u32| match offset % 8 {
            0 => u32::try_from(value & 0xffff_ffff).unwrap(),
            4 => u32::try_from(value >> 32).unwrap(),
            _ => panic!("an unaligned offset"),
        };
        match offset {
            0 => self.number,
            4 => self.architecture,
            16..64 => of(
                self.arguments[usize::try_from((offset - 16) / 8).unwrap()],
                offset,
            ),
            _ => panic!("offset {offset} is of no use here"),
        }
    }
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

/// Runs a filter as the kernel does: the part of classic BPF that is in use here (linux/filter.h); all else is a panic. Returns what
/// it says, and the number of instructions that it took.
fn run(program: &[sock_filter], call: &Call) -> (u32, usize) {
    let (mut accumulator, mut at) = (0_u32, 0_usize);
    for steps in 1.. {
        let sock_filter { code, jt, jf, k } = program[at].clone();
        at += 1;
        let mut jump = |is_true| at += usize::from(if is_true { jt } else { jf });
        match code {
            0x05 => at += usize::try_from(k).unwrap(),
            0x06 => return (k, steps),
            0x15 => jump(accumulator == k),
            0x20 => accumulator = call.word(k),
            0x25 => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            0x54 => accumulator &= k,
            _ => panic!("instruction {code:#x}"),
        }
    }
    unreachable!("a filter goes forward only")
}

/// How many instructions the kernel takes when it looks which of an architecture's calls need no look at their arguments.
fn cost(program: &[sock_filter], architecture: u32) -> usize {
    let call = |number| Call {
        architecture,
        arguments: [0; 6],
        number,
    };
    (0..512).map(|number| run(program, &call(number)).1).sum()
}

/// What a table says.
fn expected(rules: &[(u32, &Rule)], call: &Call) -> u32 {
    let rule = rules.iter().find(|(number, _)| *number == call.number);
    let argument = |index: u8| call.arguments[usize::from(index)];
    let is_allowed = match rule.map(|(_, rule)| &rule.argument) {
        None => false,
        Some(Argument::Any) => true,
        Some(Argument::Are(values)) => values
            .iter()
            .all(|(index, value)| argument(*index) == *value),
        Some(Argument::Masked(values)) => values
            .iter()
            .all(|(index, mask, value)| argument(*index) & mask == *value),
        Some(Argument::Differs(index, mask, value)) => argument(*index) & mask != *value,
    };
    if is_allowed { ALLOW } else { KILL }
}

/// Arguments near to what a rule wants: as it wants them, with each bit of each flipped, and all ones.
fn arguments(rule: &Rule) -> Vec<[u64; 6]> {
    let mut wanted = [0x5a5a_5a5a_5a5a_5a5a; 6];
    let constrained: Vec<u8> = match rule.argument {
        Argument::Any => Vec::new(),
        Argument::Are(values) => {
            for (index, value) in values {
                wanted[usize::from(*index)] = *value;
            }
            values.iter().map(|(index, _)| *index).collect()
        }
        Argument::Masked(values) => {
            for (index, mask, value) in values {
                wanted[usize::from(*index)] = !mask | value;
            }
            values.iter().map(|(index, ..)| *index).collect()
        }
        // What is not allowed, and with each bit of that flipped.
        Argument::Differs(index, _, value) => {
            wanted[usize::from(index)] = value;
            vec![index]
        }
    };
    let mut cases = vec![wanted, [0; 6], [u64::MAX; 6]];
    for index in constrained {
        for bit in 0..u64::BITS {
            let mut case = wanted;
            case[usize::from(index)] ^= 1 << bit;
            cases.push(case);
        }
    }
    cases
}

/// Every number that a call has anywhere, and those at the ends of the kernel's and the filters' ranges.
fn numbers() -> impl Iterator<Item = u32> {
    let odd = [0x3fff_ffff, 0x4000_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    let x32 = 0x4000_0000..0x4000_0400;
    (0..2048).chain(x32).chain(odd)
}

fn numbered(role: Role, numbers: &[(&str, u32)]) -> Vec<(u32, &'static Rule)> {
    let number = |rule: &Rule| {
        let found = numbers.iter().find(|(name, _)| *name == rule.name);
        found
            .unwrap_or_else(|| panic!("no {}: run tests/filters/run", rule.name))
            .1
    };
    rules(role).map(|rule| (number(rule), rule)).collect()
}

#[test]
fn tables_trees_and_lists_agree() {
    for (name, architecture, trees, known) in ARCHITECTURES {
        for ((role_name, role), tree) in ROLES.into_iter().zip(trees) {
            let rules = numbered(role, known);
            let list = rules
                .iter()
                .map(|(number, rule)| (c_long::from(*number), *rule));
            let list = translate(list, name).unwrap();
            let mut allowed = 0;
            let mut agree = |call: &Call, expected: u32| {
                let place = format!(
                    "{name} {role_name}: {call:?}; if the table is right, run tests/filters/run"
                );
                assert_eq!(run(tree, call).0, expected, "{place}");
                assert_eq!(run(&list, call).0, expected, "{place}");
                allowed += usize::from(expected == ALLOW);
            };
            for number in numbers() {
                let rule = rules.iter().find(|(known, _)| *known == number);
                let cases = rule.map_or(vec![[0; 6]], |(_, rule)| arguments(rule));
                for arguments in cases {
                    let mut call = Call {
                        architecture,
                        arguments,
                        number,
                    };
                    agree(&call, self::expected(&rules, &call));
                    // i386, x86-64, arm, aarch64 and nonsense.
                    for other in [
                        0x4000_0003,
                        0xc000_003e,
                        0x4000_0028,
                        0xc000_00b7,
                        0,
                        u32::MAX,
                    ] {
                        if other != architecture {
                            call.architecture = other;
                            agree(&call, KILL);
                        }
                    }
                }
            }
            assert!(allowed >= rules.len(), "{name} {role_name}");
            let cost = [tree, list.as_slice()].map(|program| cost(program, architecture));
            assert!(cost[0] < cost[1] / 2, "{name} {role_name}: {cost:?}");
        }
    }
}

#[test]
fn the_numbers_are_those_of_this_machine() {
    let own = ARCHITECTURES
        .iter()
        .find(|(name, ..)| *name == std::env::consts::ARCH);
    let Some((.., known)) = own else { return };
    for (_, role) in ROLES {
        for (number, rule) in numbered(role, known) {
            assert_eq!(c_long::from(number), rule.call, "{}", rule.name);
        }
    }
}

#[test]
fn every_rule_has_its_reason_and_stands_once() {
    for (_, role) in ROLES {
        let rules: Vec<_> = rules(role).chain(DEBUG).collect();
        assert!(rules.iter().all(|rule| !rule.why.is_empty()));
        let calls: std::collections::BTreeSet<_> = rules.iter().map(|rule| rule.call).collect();
        assert_eq!(calls.len(), rules.len());
    }
}

#[test]
fn every_role_has_a_filter() {
    for (_, role) in ROLES {
        assert!(!compile(role).unwrap().is_empty());
    }
}

/// For tests/filters/run.
#[test]
#[ignore = "prints the tables for tests/filters/run"]
fn show_the_tables() {
    use std::fmt::Write as _;
    let mut text = String::new();
    for (name, role) in ROLES {
        writeln!(text, "table: filter {name}").unwrap();
        for rule in rules(role) {
            let call = rule.name.strip_prefix("SYS_").unwrap();
            match rule.argument {
                Argument::Any => write!(text, "table: any {call}").unwrap(),
                Argument::Are(values) => {
                    write!(text, "table: are {call}").unwrap();
                    for (index, value) in values {
                        write!(text, " {index}={value}").unwrap();
                    }
                }
                Argument::Masked(values) => {
                    write!(text, "table: masked {call}").unwrap();
                    for (index, mask, value) in values {
                        write!(text, " {index}&{mask}={value}").unwrap();
                    }
                }
                Argument::Differs(index, mask, value) => {
                    let lines = differing(mask, value)
                        .map(|(bit, other)| format!("table: masked {call} {index}&{bit}={other}"));
                    text += &lines.collect::<Vec<_>>().join("\n");
                }
            }
            writeln!(text).unwrap();
        }
    }
    std::io::Write::write_all(&mut std::io::stdout(), format!("\n{text}").as_bytes()).unwrap();
}
