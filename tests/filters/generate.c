/* generate - system call filters as search trees, made by libseccomp from the tables of src/sandbox/filter/tables.rs.
 *
 * Reads lines "arch NAME", "filter NAME", "any CALL", "are CALL INDEX=VALUE...", "masked CALL
 * INDEX&MASK=VALUE..."; writes Rust. A call may have several lines, of which one must hold. Numbers are decimal.
 * Used by tests/filters/run alone. */
#include <errno.h>
#include <inttypes.h>
#include <linux/filter.h>
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static scmp_filter_ctx filter;
static char name[64];
static uint32_t architecture;
static char numbers[16384];

static void fail(const char *what) {
    fprintf(stderr, "generate: %s\n", what);
    exit(1);
}

static void check(int result, const char *what) {
    if (result < 0) {
        fprintf(stderr, "generate: %s: %s\n", what, strerror(-result));
        exit(1);
    }
}

/* The filter of before is complete: its instructions, as Rust. */
static void finish(void) {
    struct sock_filter code[4096];
    FILE *file = tmpfile();
    size_t count, i;
    if (!filter)
        return;
    if (!file)
        fail("no temporary file");
    check(seccomp_export_bpf(filter, fileno(file)), "seccomp_export_bpf");
    rewind(file);
    count = fread(code, sizeof *code, sizeof code / sizeof *code, file);
    printf("pub(super) const %s: &[sock_filter] = &[\n", name);
    for (i = 0; i < count; i++)
        printf("instruction(%#x, %u, %u, %#" PRIx32 "),\n", code[i].code, code[i].jt, code[i].jf, code[i].k);
    printf("];\n\n");
    fclose(file);
    seccomp_release(filter);
    filter = NULL;
}

static void begin(void) {
    finish();
    if (scanf("%63s", name) != 1 || !(filter = seccomp_init(SCMP_ACT_KILL_PROCESS)))
        fail("no filter");
    check(seccomp_attr_set(filter, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS), "ACT_BADARCH");
    /* 2: a binary tree over the numbers. */
    check(seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2), "CTL_OPTIMIZE");
    if (seccomp_arch_native() != architecture) {
        check(seccomp_arch_add(filter, architecture), "seccomp_arch_add");
        check(seccomp_arch_remove(filter, seccomp_arch_native()), "seccomp_arch_remove");
    }
}

static void rule(const char *kind) {
    struct scmp_arg_cmp conditions[6];
    unsigned int count = 0;
    char call[64], line[128];
    uint64_t mask, value;
    unsigned int index;
    int number, length;
    if (scanf("%63s", call) != 1)
        fail("no call");
    number = seccomp_syscall_resolve_name_arch(architecture, call);
    if (number < 0)
        fail(call);
    if (strcmp(kind, "masked") == 0) {
        while (count < 6 && scanf(" %u&%" SCNu64 "=%" SCNu64, &index, &mask, &value) == 3)
            conditions[count++] = SCMP_CMP64(index, SCMP_CMP_MASKED_EQ, mask, value);
    } else if (strcmp(kind, "are") == 0) {
        while (count < 6 && scanf(" %u=%" SCNu64, &index, &value) == 2)
            conditions[count++] = SCMP_CMP64(index, SCMP_CMP_EQ, value);
    } else if (strcmp(kind, "any") != 0)
        fail(kind);
    /* By number, exactly: nothing is put in the place of a call. */
    number = seccomp_syscall_resolve_name(call);
    check(seccomp_rule_add_exact_array(filter, SCMP_ACT_ALLOW, number, count, conditions), call);
    number = seccomp_syscall_resolve_name_arch(architecture, call);
    length = snprintf(line, sizeof line, "(\"SYS_%s\", %d),\n", call, number);
    if (length < 0 || strlen(numbers) + (size_t)length >= sizeof numbers)
        fail("too many calls");
    if (!strstr(numbers, line))
        strcat(numbers, line);
}

int main(void) {
    char word[64];
    while (scanf("%63s", word) == 1) {
        if (strcmp(word, "arch") == 0) {
            if (scanf("%63s", word) != 1 || !(architecture = seccomp_arch_resolve_name(word)))
                fail("unknown architecture");
            printf("//! Made by tests/filters/run from the tables in tables.rs; not to be edited.\n\n");
            printf("use super::{instruction, sock_filter};\n\n");
        } else if (strcmp(word, "filter") == 0)
            begin();
        else
            rule(word);
    }
    finish();
    printf("/// The numbers of the calls, for the tests.\n#[cfg(test)]\n");
    printf("pub(super) const NUMBERS: &[(&str, u32)] = &[\n%s];\n", numbers);
    return 0;
}
