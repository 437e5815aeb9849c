// Make one charge with Stripe's SDK for Node, and print what came of it as JSON.
import Stripe from "stripe";

const { port, amount, key, timeout, retries } = JSON.parse(process.argv[2]);
const stripe = new Stripe("sk_test_alice", {
  protocol: "http",
  host: "127.0.0.1",
  port,
  timeout: timeout * 1000,
  maxNetworkRetries: retries,
  telemetry: false,
});
let said;
try {
  const options = key === null ? {} : { idempotencyKey: key };
  said = await stripe.charges.create({ amount, currency: "eur" }, options);
} catch (error) {
  said = { failed: error.type, status: error.statusCode ?? null, code: error.code ?? null };
}
process.stdout.write(JSON.stringify(said));
// A connection that is kept open would keep the process.
process.exit();
