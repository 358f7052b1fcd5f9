/* The IMAP server behind every contestant: next to nothing, so that what is measured is what stands in front of it.
   After LOGIN it knows two commands of its own: XDOWN n sends n octets, XUP n takes n octets. */
#include <string.h>
#include <unistd.h>

/* Untouched pages of this cost nothing; XDOWN sends the zeros that it holds. */
static char bulk[64 * 1024];
static char input[1024];
static size_t have;

static void put(const char *bytes, size_t length)
{
	while (length > 0) {
		ssize_t written = write(1, bytes, length);
		if (written <= 0)
			_exit(1);
		bytes += written;
		length -= written;
	}
}

/* The next line's length with its LF, read as needed. */
static size_t line(void)
{
	for (;;) {
		char *end = memchr(input, '\n', have);
		ssize_t count;
		if (end)
			return end - input + 1;
		if (have == sizeof input)
			_exit(1);
		count = read(0, input + have, sizeof input - have);
		if (count <= 0)
			_exit(0);
		have += count;
	}
}

static void reply(const char *tag, size_t length, const char *text)
{
	char answer[256];
	size_t rest = strlen(text);
	if (length + rest > sizeof answer)
		_exit(1);
	memcpy(answer, tag, length);
	memcpy(answer + length, text, rest);
	put(answer, length + rest);
}

static unsigned long long number(const char *text)
{
	unsigned long long value = 0;
	while (*text >= '0' && *text <= '9')
		value = value * 10 + (*text++ - '0');
	return value;
}

static void down(unsigned long long left)
{
	while (left > 0) {
		size_t some = left < sizeof bulk ? left : sizeof bulk;
		put(bulk, some);
		left -= some;
	}
}

/* What came with the command counts. */
static void up(unsigned long long left)
{
	size_t some = left < have ? left : have;
	memmove(input, input + some, have - some);
	have -= some;
	left -= some;
	while (left > 0) {
		ssize_t count = read(0, bulk, left < sizeof bulk ? left : sizeof bulk);
		if (count <= 0)
			_exit(1);
		left -= count;
	}
	memset(bulk, 0, sizeof bulk);
}

int main(void)
{
	static const char greeting[] = "* OK [CAPABILITY IMAP4rev1] ready\r\n";
	put(greeting, sizeof greeting - 1);
	for (;;) {
		char command[sizeof input];
		size_t length = line();
		char *space = memchr(input, ' ', length);
		size_t tag = space ? space - input : 0;
		memcpy(command, input, length);
		command[length - 1] = 0;
		memmove(input, input + length, have - length);
		have -= length;
		space = command + tag + 1;
		if (strncmp(space, "XDOWN ", 6) == 0) {
			down(number(space + 6));
			reply(command, tag, " OK sent\r\n");
		} else if (strncmp(space, "XUP ", 4) == 0) {
			up(number(space + 4));
			reply(command, tag, " OK taken\r\n");
		} else if (strncmp(space, "LOGOUT", 6) == 0) {
			reply("* BYE\r\n", 7, "");
			reply(command, tag, " OK done\r\n");
			return 0;
		} else if (strncmp(space, "CAPABILITY", 10) == 0) {
			reply("* CAPABILITY IMAP4rev1\r\n", 24, "");
			reply(command, tag, " OK done\r\n");
		} else {
			reply(command, tag, " OK done\r\n");
		}
	}
}
